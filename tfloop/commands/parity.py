"""The first steps in every mode, compared."""

from typing import Any

from tfloop.commands.command import ALONE, Command, number_of_steps, start
from tfloop.config import Config


def parity(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    steps, config = number_of_steps(options), config.replace(ensemble=1)
    start(config)
    from tfloop.inspection import checks

    print(
        f"weights after each of {steps} steps, compared with: compiled, plain forward pass, "
        "resident pipeline, CPU"
    )
    for result in checks.parity(config, steps):
        text = "the same, bit for bit"
        if result.step is not None:
            text = (
                f"differs after step {result.step}, first in {result.layer}, by {result.ulps} "
                f"units in the last place; after the last step by at most {result.largest:.1e} of "
                "a weight's largest entry"
            )
        print(f"  {result.mode:24} {text}", flush=True)
    return 0


COMMAND = Command(
    parity,
    "the first steps in every mode: where do they differ first, and by how much?",
    topic="check",
    settings=ALONE,
    options={"steps": ("5", "how many steps")},
)
