"""A stretch of a run trained again, with more to look at."""

from typing import Any

from tfloop.commands.command import FAILED, RUN_CODE, WHERE, Command, one_argument, start
from tfloop.config import Config
from tfloop.errors import UserError
from tfloop.settings import whole


def replay(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    from tfloop.history.records import Records

    records = Records(one_argument(arguments, "RUN", "the folder of a run"))
    given = options["given"] | {name: options[name] for name in RUN_CODE if options[name]}
    config, device = start(records.trained_by(given))
    from tfloop.history import stretch

    first = records.step_of(options["from"] or "0")
    last = records.steps if not options["to"] else _end(records, options["to"])
    if first >= last:
        raise UserError(
            f"--from={options['from']} --to={options['to']}: step {first} is not before step {last}"
        )
    say = (lambda line: None) if config.quiet else print
    histograms = options["histograms"]
    if histograms:
        config = config.replace(steps_per_call=1)
    out = options["out"]
    is_same = stretch.train_again(records, config, first, last, say, out, histograms, device)
    return 0 if is_same else FAILED


def _end(records: Any, at: str) -> int:
    """The step that comes after the stretch."""
    if whole(at) == records.steps:
        return records.steps
    return records.step_of(at)


_OPTIONS = {
    "from": ("", "the first step: a number, epoch:N, last, diverged or spike; unset: 0"),
    "to": ("", "the step that is no longer made, named in the same way; unset: the end"),
    "histograms": (False, "those of weights, gradients and activations after every step"),
    "out": ("", "the folder that is written; unset: RUN/replay-FROM-TO"),
    **RUN_CODE,
}
COMMAND = Command(
    replay,
    "train a stretch of a run again, with other summaries, a profile or checks",
    topic="look",
    arguments="RUN",
    settings=(*WHERE, "summaries", "profile", "check_numerics", "steps_per_call", "quiet"),
    options=_OPTIONS,
)
