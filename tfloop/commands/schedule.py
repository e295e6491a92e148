"""The learning rate over a run."""

from typing import Any

from tfloop.commands.command import HOW, Command, start
from tfloop.config import Config
from tfloop.errors import UserError
from tfloop.wording import counted


def schedule(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    if not options["plot"] and not options["print"]:
        raise UserError("schedule: choose --print, or --plot=FILE.png")
    start(config)
    from tfloop import assembly
    from tfloop.inspection import plots

    data = assembly.load_data(config.replace(standardize=False))
    steps = assembly.steps_per_epoch(config, data)
    rate_at = assembly.make_schedule(config, steps)
    total = config.epochs * steps
    if options["print"]:
        print(f"{'epoch':>8} {'step':>8}  rate")
        for step in sorted({round(share * (total - 1) / 20) for share in range(21)}):
            print(f"{step / steps:8.2f} {step:8d}  {float(rate_at(step)):.8g}")
    if options["plot"]:
        title = f"{config.schedule}, {counted(config.epochs, 'epoch')} of {steps} steps"
        plots.schedule(rate_at, steps, total, title, options["plot"])
        print(options["plot"])
    return 0


COMMAND = Command(
    schedule,
    "the learning rate over a run",
    topic="look",
    settings=HOW,
    options={
        "print": (False, "print a table"),
        "plot": ("", "write a plot to this PNG file"),
    },
)
