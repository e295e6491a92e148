"""Train on one batch until it is memorised."""

from typing import Any

from tfloop.commands.command import ALONE, FAILED, Command, number_of_steps, start
from tfloop.config import Config


def overfit(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    most = number_of_steps(options)
    config, _ = start(config.replace(ensemble=1))
    from tfloop.inspection import checks

    for record in checks.overfit(config, most):
        is_power_of_two = record.step & (record.step - 1) == 0
        if is_power_of_two:
            share = record.accuracy
            accuracy = "" if share is None else f"  accuracy {100 * share:6.2f} %"
            print(f"step {record.step:5}  loss {record.loss:.4f}{accuracy}", flush=True)
    verdict = "memorised" if record.done else "NOT memorised"
    accuracy = "" if record.accuracy is None else f", accuracy {100 * record.accuracy:.2f} %"
    print(
        f"{config.batch_size} examples {verdict} after {record.step} steps: loss "
        f"{record.loss:.4f}{accuracy}"
    )
    return 0 if record.done else FAILED


COMMAND = Command(
    overfit,
    "train on one batch until it is memorised",
    topic="check",
    settings=ALONE,
    options={"steps": ("1000", "give up after N steps")},
)
