"""The article's experiments over several seeds, by its own protocol and by a clean one.

Clean: MNIST's own test images, the last epoch, nothing chosen. The article's: all 70000 images
shuffled and cut again, and of all epochs the one that did best on the test images.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tfloop.config import Config
from tfloop.errors import DivergenceError
from tfloop.search.sweeps import Sweep, Trial
from tfloop.wording import counted

_ARTICLE3 = "99.25 % reproducible, 99.35 % on average, 99.4 to 99.45 % at best, in 80 epochs"
EXPERIMENTS = {  # preset → (what it is, what the article says of it)
    "article2": ("32-64-64, dense 70", "99.0 % after 5 epochs"),
    "article3": ("64-64-128, dense 120, L2, falling rate", _ARTICLE3),
    "article3_32": ("32-64-128, dense 120, L2, falling rate", _ARTICLE3),
}
CLEAN, ARTICLE = "clean", "article"
_FROM_THE_MACHINE = ("device", "shards", "intra_op_threads", "inter_op_threads", "onednn")


class Row(NamedTuple):
    """One experiment by one protocol; test accuracies by seed and epoch."""

    preset: str
    protocol: str
    epochs: int
    seeds: list[int]
    by_epoch: list[list[float]]  # [seeds][epochs]
    seconds: list[float]  # of training, by seed

    @property
    def claimed(self) -> list[float]:
        """What the protocol reports for each seed: the last epoch, or the best."""
        if self.protocol == ARTICLE:
            return [max(epochs) for epochs in self.by_epoch]
        return self.last

    @property
    def last(self) -> list[float]:
        """The accuracy after the last epoch, for each seed."""
        return [epochs[-1] for epochs in self.by_epoch]


def planned(
    config: Config, presets: list[str], seeds: tuple[int, ...], folder: Path
) -> list[Trial]:
    """A trial for each experiment, protocol and seed.

    With the article's protocol each seed has a cut of its own.
    """
    trials: list[Trial] = []
    for preset in presets:
        for protocol in (CLEAN, ARTICLE):
            for seed in seeds:
                values = {"preset": preset, "protocol": protocol, "seed": seed}
                name = f"{preset}-{protocol}-{config.epochs}-epochs-seed-{seed}"
                own = _config(config, preset, protocol, seed, folder)
                trials.append(Trial(len(trials) + 1, values, own, folder / name))
    return trials


def _config(config: Config, preset: str, protocol: str, seed: int, folder: Path) -> Config:
    cut: dict[str, Any] = {"split": "standard"}
    if protocol == ARTICLE:
        cut = {"split": "shuffled", "split_seed": seed}
    machine = {name: getattr(config, name) for name in _FROM_THE_MACHINE}
    own = Config.make(
        preset,
        epochs=config.epochs,
        seed=seed,
        summaries=config.summaries,
        name=f"{preset}-{protocol}",
        logdir=str(folder),
        **cut,
    )
    return own.replace(**machine)


def train(
    config: Config,
    trials: list[Trial],
    device: str,
    stop: Callable[[], bool],
    say: Callable[[str], None],
) -> bool:
    """Train what is not trained yet; false where `stop` was true before the end.

    Raises:
      DivergenceError: a trial diverged.
    """
    from tfloop import assembly

    by_data: dict[tuple, list[Trial]] = {}
    for trial in trials:
        key = trial.config.split, trial.config.split_seed
        by_data.setdefault(key, []).append(trial)
    for same in by_data.values():
        if all(trial.result and trial.result["finished"] for trial in same):
            continue
        data = assembly.load_data(same[0].config)
        if not Sweep(config, same, data, device, say).run(1, stop):
            return False
    for trial in trials:
        assert trial.result
        if diverged := trial.result["diverged"]:
            step, layer = diverged["step"], diverged["layer"]
            message = (
                f"{trial.folder}: diverged at step {step}, in {layer}; there is nothing to report"
            )
            raise DivergenceError(message, step, layer)
    return True


def rows(trials: list[Trial]) -> list[Row]:
    """What came out, from the trials' results."""
    groups: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        key = trial.values["preset"], trial.values["protocol"]
        groups.setdefault(key, []).append(trial)
    rows = []
    for (preset, protocol), same in groups.items():
        results = [trial.result for trial in same if trial.result]
        by_epoch = [[epoch["test"]["accuracy"] for epoch in result["epochs"]] for result in results]
        seeds = [trial.config.seed for trial in same]
        seconds = [result["seconds"]["training"] for result in results]
        rows.append(Row(preset, protocol, same[0].config.epochs, seeds, by_epoch, seconds))
    return rows


def markdown(rows: list[Row], picture: str, device: str) -> str:
    """The report."""
    lines = [
        "# The article's experiments",
        "",
        "Test accuracy, %, over seeds. Clean: MNIST's own test images, after the last epoch. The "
        "article's protocol: all images shuffled and cut again (here differently for each seed), "
        "and the best epoch on the test images.",
        "",
        "| experiment | epochs | seeds | protocol | mean | standard deviation | best | s of "
        "training, a seed | the article |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | --- |",
        *map(_row_line, rows),
        "",
        f"![Test accuracy by epoch and by protocol]({picture})",
        "",
        "## What the protocol is worth",
        "",
    ]
    for clean, article in zip(rows[::2], rows[1::2], strict=True):
        lines.append(_worth_line(clean, article))
    lines += [
        "",
        "## Every seed",
        "",
        "| experiment | protocol | seed | last epoch | best epoch |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        for seed, epochs in zip(row.seeds, row.by_epoch, strict=True):
            last, best = 100 * epochs[-1], 100 * max(epochs)
            lines.append(f"| `{row.preset}` | {row.protocol} | {seed} | {last:.2f} | {best:.2f} |")
    return "\n".join([*lines, "", f"Device: {device}.", ""])


def _row_line(row: Row) -> str:
    layers, claim = EXPERIMENTS[row.preset]
    accuracies = [100 * accuracy for accuracy in row.claimed]
    spread = f"{statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    cells = [
        f"`{row.preset}`: {layers}",
        row.epochs,
        len(row.seeds),
        row.protocol,
        f"{statistics.fmean(accuracies):.2f}",
        spread,
        f"{max(accuracies):.2f}",
        f"{statistics.fmean(row.seconds):.1f}",
        claim,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _worth_line(clean: Row, article: Row) -> str:
    best, last, standard = (
        100 * statistics.fmean(values) for values in (article.claimed, article.last, clean.last)
    )
    return (
        f"- `{clean.preset}`, {counted(clean.epochs, 'epoch')}: choosing the best epoch on the "
        f"test images adds {best - last:+.2f} points to the last epoch's {last:.2f} %; the "
        f"shuffled cut's last epoch is {last - standard:+.2f} points from the standard one's "
        f"{standard:.2f} %."
    )
