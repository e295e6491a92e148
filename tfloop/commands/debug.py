"""Step through the training in pdb: of a new run from its start, or of a run from any step on."""

from typing import Any

from tfloop.commands.command import HOW, Command, start, without
from tfloop.config import Config
from tfloop.errors import DivergenceError, UserError
from tfloop.settings import whole


def debug(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    if len(arguments) > 1 or "" in arguments:
        raise UserError(f"expected one RUN or none; found {len(arguments)} arguments")
    at, condition, on_nan = (options[f"break_{name}"] for name in ("at", "if", "on_nan"))
    _check(at, condition, on_nan)
    if arguments:
        return _debug_run(arguments[0], options)
    if options["at"]:
        raise UserError(
            f"--at={options['at']}: of which run? debug RUN --at=…; of a new one: --break_at"
        )
    config, _ = start(config.replace(**_EAGER))
    from tfloop.assembly import make_loop
    from tfloop.inspection import debugger

    loop = make_loop(config, grad_fn=_grad_fn(bool(at or condition or on_nan)))
    if debugger.is_under_another_debugger():
        loop.fit(config.epochs)
        return 0
    return _run(loop, config.epochs, int(at) if at else None, condition, on_nan)


_EAGER = {"eager": True, "fast": False, "shards": 1, "steps_per_call": 1, "ensemble": 1}


def _debug_run(folder: str, options: dict[str, Any]) -> int:
    """Go to a step of the run as it was, compiled; from there on step by step."""
    if options["break_at"]:
        raise UserError(f"--break_at={options['break_at']}: of a run, the step is named by --at")
    from tfloop.history.records import Records

    at, records = options["at"] or "last", Records(folder)
    config, device = start(records.trained_by(options["given"]))
    from tfloop.assembly import loop_of
    from tfloop.history import replay as history

    step = records.step_of(at)
    replay = history.Replay(records, config, print, device)
    step = history.go_to(replay, step, to_the_spike=at == "spike")
    for line in history.told(replay):
        print(line)
    named = dict(_EAGER, jit_compile=False, accumulate=1)
    del named["ensemble"]
    condition, on_nan = options["break_if"], options["break_on_nan"]
    loop = loop_of(
        config,
        replay.loop.state,
        replay.loop.data,
        grad_fn=_grad_fn(bool(condition or on_nan)),
        **named,
    )
    from tfloop.inspection import debugger

    stops_at = None if condition or on_nan else step
    if debugger.is_under_another_debugger():
        loop.fit(config.epochs)
        return 0
    return _run(loop, max(config.epochs, int(loop.state.epoch) + 1), stops_at, condition, on_nan)


def _grad_fn(has_stops: bool) -> Any:
    """The pass, layer by layer; in an editor's debugger it stops there once."""
    from tfloop.inspection import debugger

    if not debugger.is_under_another_debugger():
        return debugger.forward_and_backward
    if has_stops:
        raise UserError(
            "--break_at, --break_if and --break_on_nan are pdb's: in an editor, set a breakpoint "
            "in train_step"
        )
    return debugger.stop_once(debugger.forward_and_backward)


def _run(loop: Any, epochs: int, at: int | None, condition: str, on_nan: bool) -> int:
    from tfloop.inspection import debugger

    first = int(loop.state.global_step)
    try:
        is_finished = debugger.run(loop, epochs, at, condition, on_nan)
    except DivergenceError as error:
        print(error.as_flags)
        is_finished = True
    end, steps = "done" if is_finished else "quit", int(loop.state.global_step)
    of = f", from step {first} on" if first else ""
    print(f"{end} after {steps - first} steps{of}; nothing was written")
    return 0


def _check(at: str, condition: str, on_nan: bool) -> None:
    if sum(map(bool, (at, condition, on_nan))) > 1:
        raise UserError("--break_at, --break_if and --break_on_nan exclude each other: choose one")
    if at and whole(at) is None:
        raise UserError(f"--break_at={at}: expected the number of a step, 0 or more")
    try:
        compile(condition or "0", "--break_if", "eval")
    except (SyntaxError, ValueError) as error:
        raise UserError(f"--break_if={condition}: is no Python expression: {error}") from None


_OPTIONS = {
    "at": (
        "",
        "with RUN, stop before this step of it: a number, epoch:N, last, diverged, or spike, the "
        "largest jump of the loss; unset: last",
    ),
    "break_at": ("", "stop at this step only"),
    "break_if": (
        "",
        "stop before the update where this holds: 'gradients.norm > 10'; it is Python and is run, "
        "from a --flagfile, too",
    ),
    "break_on_nan": (False, "stop before the update where a value is not finite"),
}
COMMAND = Command(
    debug,
    "train eagerly and stop in pdb at the step, of a new run or at any step of one that was made",
    topic="check",
    arguments="[RUN]",
    settings=without(
        HOW,
        "eager",
        "jit_compile",
        "fast",
        "shards",
        "steps_per_call",
        "accumulate",
        "seeds",
        "runs",
        "ensemble",
        "on_nan",
    ),
    options=_OPTIONS,
)
