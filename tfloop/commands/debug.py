"""Step through the training in pdb."""

from typing import Any

from tfloop.commands.command import HOW, Command, start, without
from tfloop.config import Config
from tfloop.errors import UserError


def debug(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    at, condition, on_nan = (options[f"break_{name}"] for name in ("at", "if", "on_nan"))
    _check(config, at, condition, on_nan)
    config, _ = start(
        config.replace(eager=True, fast=False, shards=1, steps_per_call=1, ensemble=1)
    )
    from tfloop.assembly import make_loop
    from tfloop.inspection import debugger

    grad_fn = debugger.forward_and_backward
    if debugger.is_under_another_debugger():
        if at or condition or on_nan:
            raise UserError(
                "--break_at, --break_if and --break_on_nan are pdb's: in an editor, set a "
                "breakpoint in train_step"
            )
        make_loop(config, grad_fn=debugger.stop_once(grad_fn)).fit(config.epochs)
        return 0
    loop = make_loop(config, grad_fn=grad_fn)
    is_finished = debugger.run(loop, config.epochs, int(at) if at else None, condition, on_nan)
    end, steps = "done" if is_finished else "quit", int(loop.state.global_step)
    print(f"{end} after {steps} steps; nothing was written")
    return 0


def _check(config: Config, at: str, condition: str, on_nan: bool) -> None:
    if sum(map(bool, (at, condition, on_nan))) > 1:
        raise UserError("--break_at, --break_if and --break_on_nan exclude each other: choose one")
    if at and not at.isdecimal():
        raise UserError(f"--break_at={at}: expected the number of a step, 0 or more")
    try:
        compile(condition or "0", "--break_if", "eval")
    except (SyntaxError, ValueError) as error:
        raise UserError(f"--break_if={condition}: is no Python expression: {error}") from None
    if config.precision == "mixed_float16":
        raise UserError(
            "--precision=mixed_float16: debug shows gradients without the loss scale, which 16 "
            "bits do not hold; use another"
        )


COMMAND = Command(
    debug,
    "train eagerly and stop in pdb at the step",
    topic="check",
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
    options={
        "break_at": ("", "stop at this step only"),
        "break_if": ("", "stop before the update where this holds: 'gradients.norm > 10'"),
        "break_on_nan": (False, "stop before the update where a value is not finite"),
    },
)
