"""Step through the training, and check that all is wired up right."""

from tfloop.commands.command import ALONE, FAILED, HOW, MODEL, WHERE, Command, start
from tfloop.config import Config
from tfloop.errors import UserError


def debug(config: Config, options: dict, arguments: list[str]) -> int:
    at = options["break_at"]
    if sum(map(bool, (at, options["break_if"], options["break_on_nan"]))) > 1:
        raise UserError("--break_at, --break_if and --break_on_nan exclude each other: choose one")
    if at and not at.isdecimal():
        raise UserError(f"--break_at={at}: expected the number of a step, 0 or more")
    try:
        compile(options["break_if"] or "0", "--break_if", "eval")
    except (SyntaxError, ValueError) as error:
        raise UserError(f"--break_if={options['break_if']}: is no Python expression: {error}") from None
    if config.precision == "mixed_float16":
        raise UserError("--precision=mixed_float16: debug shows gradients without the loss scale, which 16 bits do not hold; use another")
    config, _ = start(config.replace(eager=True, fast=False, shards=1, steps_per_call=1, ensemble=1))
    from tfloop import debug, runs

    if debug.under_another_debugger():
        if at or options["break_if"] or options["break_on_nan"]:
            raise UserError("--break_at, --break_if and --break_on_nan are pdb's: in an editor, set a breakpoint in train_step")
        runs.make_loop(config, differentiate=debug.stop_once(debug.forward_and_backward)).fit(config.epochs)
        return 0
    loop = runs.make_loop(config, differentiate=debug.forward_and_backward)
    finished = debug.run(loop, config.epochs, int(at) if at else None, options["break_if"], options["break_on_nan"])
    print(f"{'done' if finished else 'quit'} after {int(loop.state.global_step)} steps; nothing was written")
    return 0


def check_gradients(config: Config, options: dict, arguments: list[str]) -> int:
    start(config)
    from tfloop import checks, runs

    data = runs.load_data(config.replace(standardize=False))
    found = []
    print(f"{'':28} {'weight':22} {'worst entry':>16} {'GradientTape':>15} {'difference':>15}  error")
    for check in checks.check_gradients(config, data.image_shape, data.classes, config.seed):
        found.append(check)
        print(f"{check.what:28} {check.weight:22} {str(list(check.entry)):>16} {check.tape:15.8g} {check.difference:15.8g}  "
              f"{check.error:.1e}{'' if check.passed else '  WRONG'}", flush=True)
    worst, wrong = max(found, key=lambda check: check.error), sum(not check.passed for check in found)
    print(f"{len(found)} gradients, {wrong} wrong; the worst error is {worst.error:.1e} "
          f"({worst.what}, {worst.weight} {list(worst.entry)}; allowed: {checks.TOLERANCE:g})")
    return FAILED if wrong else 0


def parity(config: Config, options: dict, arguments: list[str]) -> int:
    steps = options["steps"]
    if not (steps.isdecimal() and int(steps)):
        raise UserError(f"--steps={steps}: expected a number of steps, 1 or more")
    config = config.replace(ensemble=1)
    start(config)
    from tfloop import checks

    print(f"weights after each of {steps} steps, compared with: compiled, plain forward pass, resident pipeline, CPU")
    for found in checks.parity(config, int(steps)):
        print(f"  {found.mode:24} " + ("the same, bit for bit" if found.step is None else
              f"differs after step {found.step}, first in {found.layer}, by {found.ulps} units in the last place; after "
              f"the last step by at most {found.largest:.1e} of a weight's largest entry"), flush=True)
    return 0


def overfit(config: Config, options: dict, arguments: list[str]) -> int:
    most = options["steps"]
    if not (most.isdecimal() and int(most)):
        raise UserError(f"--steps={most}: expected a number of steps, 1 or more")
    config, _ = start(config.replace(ensemble=1))
    from tfloop import checks

    for record in checks.overfit(config, int(most)):
        if record.step & (record.step - 1) == 0:
            print(f"step {record.step:5}  loss {record.loss:.4f}  accuracy {100 * record.accuracy:6.2f} %", flush=True)
    print(f"{config.batch_size} images {'memorised' if record.done else 'NOT memorised'} after {record.step} steps: loss "
          f"{record.loss:.4f}, accuracy {100 * record.accuracy:.2f} %")
    return 0 if record.done else FAILED


COMMANDS = {
    "debug": Command(debug, "train eagerly and stop in pdb at the step", "", tuple(
        name for name in HOW if name not in ("eager", "jit_compile", "fast", "shards", "steps_per_call", "accumulate", "seeds", "runs", "ensemble", "on_nan")), {
        "break_at": ("", "stop at this step only"),
        "break_if": ("", "stop before the update where this holds: 'gradients.norm > 10'"),
        "break_on_nan": (False, "stop before the update where a value is not finite")}),
    "check_gradients": Command(check_gradients, "GradientTape against central differences in float64",
                               settings=MODEL + ("seed",) + WHERE),
    "parity": Command(parity, "the first steps in every mode: where do they differ first, and by how much?", "", ALONE, {
        "steps": ("5", "how many steps")}),
    "overfit": Command(overfit, "train on one batch until it is memorised", "", ALONE, {
        "steps": ("1000", "give up after so many")}),
}
