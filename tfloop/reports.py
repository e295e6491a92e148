"""The article's experiments over several seeds, beside what it claims, by its own protocol and by a clean one.

Clean: MNIST's own test images, the last epoch, nothing chosen. The article's: all 70000 images shuffled and cut again,
and of all epochs the one that did best on the test images.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tfloop.config import Config
from tfloop.errors import DivergenceError
from tfloop.sweeps import Sweep, Trial

EXPERIMENTS = {  # preset → what it is, what the article says of it
    "article2": ("32-64-64, dense 70", "99.0 % after 5 epochs"),
    "article3": ("64-64-128, dense 120, L2, falling rate", "99.25 % reproducible, 99.35 % on average, 99.4 to 99.45 % at best, in 80 epochs"),
    "article3_32": ("32-64-128, dense 120, L2, falling rate", "99.25 % reproducible, 99.35 % on average, 99.4 to 99.45 % at best, in 80 epochs"),
}
CLEAN, ARTICLE = "clean", "article"


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
        return [max(epochs) if self.protocol == ARTICLE else epochs[-1] for epochs in self.by_epoch]

    @property
    def last(self) -> list[float]:
        return [epochs[-1] for epochs in self.by_epoch]


def planned(config: Config, presets: list[str], seeds: tuple[int, ...], folder: Path) -> list[Trial]:
    """A trial for each experiment, protocol and seed; with the article's protocol each seed has a cut of its own."""
    found = []
    for preset in presets:
        for protocol in (CLEAN, ARTICLE):
            for seed in seeds:
                split = dict(split="standard") if protocol == CLEAN else dict(split="shuffled", split_seed=seed)
                own = Config.make(preset, **{"epochs": config.epochs, "seed": seed, "summaries": config.summaries, **split,
                                             "name": f"{preset}-{protocol}", "logdir": str(folder)})
                own = own.replace(**{name: getattr(config, name) for name in ("device", "shards", "intra_op_threads", "inter_op_threads", "onednn")})
                found.append(Trial(len(found) + 1, {"preset": preset, "protocol": protocol, "seed": seed}, own,
                                   folder / f"{preset}-{protocol}-{config.epochs}-epochs-seed-{seed}"))
    return found


def train(config: Config, trials: list[Trial], device: str, stop: Callable[[], bool], say: Callable[[str], None]) -> bool:
    """Train what is not trained yet; false where `stop` was true before the end."""
    from tfloop import runs

    by_data = {}
    for trial in trials:
        by_data.setdefault((trial.config.split, trial.config.split_seed), []).append(trial)
    for same in by_data.values():
        if all(trial.result and trial.result["finished"] for trial in same):
            continue
        if not Sweep(config, same, runs.load_data(same[0].config), device, say).run(1, stop):
            return False
    for trial in trials:
        if diverged := trial.result["diverged"]:
            raise DivergenceError(f"{trial.folder}: diverged at step {diverged['step']}, in {diverged['layer']}; there is nothing to report",
                                  diverged["step"], diverged["layer"])
    return True


def rows(trials: list[Trial]) -> list[Row]:
    """What came out, from the trials' results."""
    found = {}
    for trial in trials:
        found.setdefault((trial.values["preset"], trial.values["protocol"]), []).append(trial)
    made = []
    for (preset, protocol), same in found.items():
        results = [trial.result for trial in same]
        made.append(Row(preset, protocol, same[0].config.epochs, [trial.config.seed for trial in same],
                        [[epoch["test"]["accuracy"] for epoch in result["epochs"]] for result in results],
                        [result["seconds"]["training"] for result in results]))
    return made


def markdown(found: list[Row], picture: str, device: str) -> str:
    """The report."""
    show = lambda accuracies: (f"{100 * statistics.fmean(accuracies):.2f} | {100 * statistics.stdev(accuracies):.2f} | "
                               if len(accuracies) > 1 else f"{100 * accuracies[0]:.2f} | | ") + f"{100 * max(accuracies):.2f}"
    lines = ["# The article's experiments", "",
             "Test accuracy, %, over seeds. Clean: MNIST's own test images, after the last epoch. The article's protocol: all images "
             "shuffled and cut again (here differently for each seed), and the best epoch on the test images.", "",
             "| experiment | epochs | seeds | protocol | mean | standard deviation | best | s of training, a seed | the article |",
             "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | --- |"]
    for row in found:
        layers, claim = EXPERIMENTS[row.preset]
        lines.append(f"| `{row.preset}`: {layers} | {row.epochs} | {len(row.seeds)} | {row.protocol} | {show(row.claimed)} | "
                     f"{statistics.fmean(row.seconds):.1f} | {claim} |")
    lines += ["", f"![Test accuracy by epoch and by protocol]({picture})", "", "## What the protocol is worth", ""]
    for clean, own in zip(found[::2], found[1::2]):
        best, last, standard = (100 * statistics.fmean(values) for values in (own.claimed, own.last, clean.last))
        lines.append(f"- `{clean.preset}`, {clean.epochs} epoch{'s' * (clean.epochs > 1)}: choosing the best epoch on the test images adds {best - last:+.2f} points "
                     f"to the last epoch's {last:.2f} %; the shuffled cut's last epoch is {last - standard:+.2f} points from the standard one's {standard:.2f} %.")
    lines += ["", "## Every seed", "", "| experiment | protocol | seed | last epoch | best epoch |", "| --- | --- | ---: | ---: | ---: |"]
    lines += [f"| `{row.preset}` | {row.protocol} | {seed} | {100 * epochs[-1]:.2f} | {100 * max(epochs):.2f} |"
              for row in found for seed, epochs in zip(row.seeds, row.by_epoch)]
    return "\n".join([*lines, "", f"Device: {device}.", ""])
