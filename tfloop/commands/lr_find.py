"""The learning-rate range test."""

from typing import Any

from tfloop.commands.command import HOW, Command, positive_rate, start, whole_number, without
from tfloop.config import FIELDS, GROUPS, Config, hyperparameters
from tfloop.errors import UserError


def lr_find(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    low, high = positive_rate(options, "low"), positive_rate(options, "high")
    steps = whole_number(options, "steps", 10)
    if low >= high:
        raise UserError(f"--low={options['low']} must lie below --high={options['high']}")
    if config.precision == "mixed_float16":
        raise UserError(
            "--precision=mixed_float16: a step that overflows has no loss to compare; use another"
        )
    unset = {name: FIELDS[name].default for name in hyperparameters("schedule")}
    constant = config.replace(**unset, schedule="constant", warmup_steps=0.0, ensemble=1)
    config, _ = start(constant)
    from tfloop.assembly import make_loop
    from tfloop.inspection import plots
    from tfloop.search.range_test import range_test

    loop = make_loop(config)
    before = loop.state.digest()
    result = range_test(loop, low, high, steps)
    state = "as it was" if loop.state.digest() == before else "CHANGED"
    print(
        f"{len(result.rates)} steps of {config.batch_size} examples at rates from {low:g} to "
        f"{result.rates[-1]:.3g}, {config.optimizer}; the state is {state}"
    )
    print(f"{'rate':>10}  loss, smoothed")
    for row in sorted({round(share * (len(result.rates) - 1) / 12) for share in range(13)}):
        print(f"{result.rates[row]:10.2e}  {result.smoothed[row]:.4f}")
    too_large = f", and too large at {result.rates[-1]:.1e}" if result.diverged else ""
    print(
        f"suggestion: --learning_rate={result.suggestion:.1e}, where the loss falls fastest; it is "
        f"least at {result.least:.1e}{too_large}"
    )
    if options["plot"]:
        title = f"range test: {config.preset}, {config.optimizer}, batch {config.batch_size}"
        plots.range_test(result, title, options["plot"])
        print(options["plot"])
    return 0


COMMAND = Command(
    lr_find,
    "the learning-rate range test: at which rate does the loss fall fastest?",
    topic="search",
    settings=without(
        HOW,
        *GROUPS["schedule"],
        "epochs",
        "eager",
        "seeds",
        "runs",
        "ensemble",
        "on_nan",
        "steps_per_call",
    ),
    options={
        "low": ("1e-6", "first rate"),
        "high": ("1", "last rate"),
        "steps": ("300", "how many steps, at most"),
        "plot": ("", "write a plot to this PNG file"),
    },
)
