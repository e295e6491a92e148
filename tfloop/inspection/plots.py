"""Plots: matplotlib Figures, PNG files, or PNG bytes for TensorBoard."""

import contextlib
import importlib.util
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfloop.errors import UserError
from tfloop.inspection.pictures import tiled, to_visible
from tfloop.metrics import NAMES

COLOURS = ("#1f5fa8", "#c05020", "#3a8a4d", "#7a4fa0", "#a08020", "#606a75")
GREY = "#888888"
FEW = 20  # images in a bin, whose share is then hardly known

Series = Mapping[str, tuple[list[float], list[float]]]  # "train/accuracy" → (x, y)


def schedule(
    rate_at: Callable[[int], Any], steps: int, total: int, title: str, path: str | Path
) -> None:
    """The rate over a run of `total` steps, with epochs of `steps` steps along the axis."""
    figure, axes = _figure()
    at = np.unique(np.linspace(0, total - 1, 2000).astype(int))
    rates = [float(rate_at(step)) for step in at]
    axes.plot(at / steps, rates, color=COLOURS[0])
    axes.set(title=title, xlabel="epoch", ylabel="learning rate")
    axes.set(xlim=(0, total / steps), ylim=(0, 1.08 * max(rates) or 1))
    axes.annotate(
        f"{rates[-1]:.3g} at step {total - 1}",
        (at[-1] / steps, rates[-1]),
        xytext=(-6, 10),
        ha="right",
        textcoords="offset points",
    )
    save(figure, path)


def range_test(result: Any, title: str, path: str | Path) -> None:
    """The loss over the rate, from a `range_test.RangeTest`, with what it suggests."""
    figure, axes = _figure()
    colour, label = COLOURS[0], "loss of each step's batch"
    axes.plot(result.rates, result.losses, color=colour, linewidth=0.6, alpha=0.4, label=label)
    axes.plot(result.rates, result.smoothed, color=colour, linewidth=1.8, label="smoothed")
    marks = ((result.suggestion, "falls fastest", "right"), (result.least, "least", "left"))
    for rate, what, side in marks:
        style = ":" if what == "least" else "--"
        axes.axvline(rate, color=COLOURS[1], linewidth=1, linestyle=style)
        axes.annotate(
            f"{what}: {rate:.2g}",
            (rate, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if side == "right" else 4, -12),
            ha=side,
            textcoords="offset points",
            color=COLOURS[1],
        )
    axes.set(title=title, xlabel="learning rate", ylabel="loss", xscale="log")
    axes.set(ylim=(0, 1.3 * result.smoothed[:10].max()))
    axes.legend(loc="lower left", fontsize=8)
    save(figure, path)


def growth(found: Any, path: str | Path) -> None:
    """How far two runs are apart by the steps since they parted, of a `difference.Difference`."""
    figure, axes = _figure()
    steps = [grown.steps for grown in found.growth]
    losses = [abs(grown.losses[0] - grown.losses[1]) for grown in found.growth]
    weights = [grown.weights for grown in found.growth]
    axes.plot(steps, weights, "o-", color=COLOURS[0], label="weights, of the largest weight")
    axes.plot(steps, losses, "o-", color=COLOURS[1], label="loss of a call")
    axes.set(title=f"parted at step {found.step}", xlabel="steps later", ylabel="difference")
    axes.set(xscale="log", yscale="log")
    axes.legend(fontsize=8)
    save(figure, path)


def curves(
    runs: Mapping[str, Series],
    reference: float | None = None,
    along: str = "epoch",
    metric: str = "",
) -> Any:
    """Accuracy and loss over epochs, side by side, several runs overlaid: the article's figure.

    Args:
      runs: name of the run → "train/accuracy", "test/accuracy", "train/loss", "test/loss" → (x, y);
        other metrics likewise, "test/r2_score".
      reference: an accuracy to draw a line at.
      along: what x counts.
      metric: what is drawn beside the loss; "": the accuracy, or where there is none the first
        other metric, or nothing.

    Returns:
      A matplotlib Figure.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator

    metric = metric or _metric_of(runs)
    figure, panels = _figure(2, (11, 4.2)) if metric else _figure(1, (7, 4.2))
    left, right = panels if metric else (None, panels)
    for index, (name, series) in enumerate(runs.items()):
        colour = COLOURS[index % len(COLOURS)]
        for axes, what in ((left, metric), (right, "loss")):
            held_out = "test" if f"test/{what}" in series else "validation"
            for part in ("train", held_out) if axes else ():
                x, y = series.get(f"{part}/{what}", ([], []))
                if not x:
                    continue
                label = _curve_label(name, part, what, y)
                _draw_curve(axes, x, y, part, colour, label)
    if reference is not None and left:
        left.axhline(reference, color=GREY, linewidth=1, linestyle=":")
        left.annotate(
            f"{100 * reference:.2f} %",
            (0, reference),
            xycoords=("axes fraction", "data"),
            xytext=(4, 3),
            textcoords="offset points",
            color="#666666",
        )
    limits = _accuracy_limits(runs, reference) if metric == "accuracy" else None
    if left and limits:
        left.set_ylim(*limits)
    if left and metric == "accuracy":
        left.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.6g} %")
    if left:
        left.set(title=_plain(metric), xlabel=along)
    right.set(title="loss", xlabel=along)
    if all(value > 0 for line in right.lines for value in line.get_ydata()):
        right.set(yscale="log", title="loss, logarithmic")
        right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.yaxis.set_minor_formatter("")
    right.yaxis.set_major_formatter("{x:g}")
    for axes in (left, right):
        if axes:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    place = "lower right" if metric == "accuracy" else "best"
    (left or right).legend(fontsize=8, loc=place)
    return figure


def _metric_of(runs: Mapping[str, Series]) -> str:
    """What is drawn beside the loss."""
    names = [key.partition("/")[2] for series in runs.values() for key in series]
    others = [name for name in names if name != "loss"]
    return "accuracy" if "accuracy" in others else next(iter(others), "")


def _curve_label(name: str, part: str, what: str, y: list[float]) -> str:
    label = f"{_plain(name)}, {part}" if name else part
    if not y or what == "loss":
        return label
    return f"{label}: {100 * y[-1]:.2f} %" if what == "accuracy" else f"{label}: {y[-1]:.4g}"


def _draw_curve(
    axes: Any, x: list[float], y: list[float], part: str, colour: str, label: str
) -> None:
    is_train = part == "train"
    axes.plot(
        x,
        y,
        "--" if is_train else "-",
        color=colour,
        linewidth=1 if is_train else 1.8,
        label=label,
        marker="o" if 0 < len(x) < 12 else None,
        markersize=3,
    )


def _accuracy_limits(
    runs: Mapping[str, Series], reference: float | None
) -> tuple[float, float] | None:
    """From the middle of the first climb on: the rest is decided in the last per cent."""
    accuracies = [] if reference is None else [reference]
    ends = []
    for series in runs.values():
        for key, (_, y) in series.items():
            if key.endswith("accuracy") and (finite := [v for v in y if math.isfinite(v)]):
                accuracies += finite
                ends.append(finite[-1])
    if not accuracies:
        return None
    # The end of every curve is in sight.
    low = min([max(min(accuracies), 1 - 8 * (1 - max(accuracies)) - 0.01), *ends])
    bottom = low - 0.03 * (1 - low) - 1e-4
    return bottom, min(1.0, max(accuracies)) + 0.05 * (1 - low) + 1e-4


# What `curves` draws → where tfloop, and Keras's callback, write it: (run, tag).
_BY_EPOCH = {
    "train/accuracy": ("train", "epoch_accuracy"),
    "train/loss": ("train", "epoch_loss"),
    "test/accuracy": ("test", "accuracy"),
    "test/loss": ("test", "loss/total"),
    "validation/accuracy": ("validation", "accuracy"),
    "validation/loss": ("validation", "loss/total"),
}


_PARTS = ("train", "validation", "test")  # the folders that tfloop and Keras write into
_NOT_METRICS = ("loss/", "epoch_", "gradient_norm", "evaluation_", "accuracy")


def by_epoch(scalars: list, where: str) -> dict[str, Series]:
    """What `curves` draws of a folder, from the scalars of its event files, by name of the fit.

    A run of tfloop is one fit, "", along epochs from 1 on. Those that Keras's callback writes are
    known: x is then the step that was written, which is the epoch from 0 on. Several of them in one
    folder are "fit 1", "fit 2" …: a step that is not above the one before begins another. Those of
    folders within have their names.

    Raises:
      UserError: there is no accuracy or loss by epoch among them.
    """
    own = os.path.basename(os.path.abspath(where))
    if {scalar.run for scalar in scalars} == {"."}:  # the folder of a part
        part = own if own in _PARTS else "train"
        scalars = [scalar._replace(run=part) for scalar in scalars]
    if any(scalar.tag == "loss/total" for scalar in scalars):
        found = {"": _own_fit(scalars)}
    else:
        found = {}
        folders = list(dict.fromkeys(os.path.dirname(scalar.run) for scalar in scalars))
        for folder in folders:
            within = [each for each in scalars if os.path.dirname(each.run) == folder]
            fits = [fit for fit in _fits_of_keras(within) if fit]
            for number, fit in enumerate(fits, start=1):
                name = folder if len(fits) == 1 else f"{folder}, fit {number}".removeprefix(", ")
                found[name] = fit
    found = {name: fit for name, fit in found.items() if fit}
    if not found:
        tags = sorted({f"{scalar.run}/{scalar.tag}" for scalar in scalars})
        shown = ", ".join(tags[:6]) or "no scalars"
        more = " …" if len(tags) > 6 else ""
        raise UserError(f"{where}: holds no accuracy or loss by epoch; it holds {shown}{more}")
    return found


def _own_fit(scalars: list) -> Series:
    """That of a run of tfloop."""
    series: dict[tuple[str, str], list[float]] = {}
    steps: dict[tuple[str, str], list[int]] = {}
    for scalar in scalars:
        series.setdefault((scalar.run, scalar.tag), []).append(scalar.value)
        steps.setdefault((scalar.run, scalar.tag), []).append(scalar.step)
    epochs, curves = steps.get(("train", "epoch_loss"), []), {}
    places = dict(_BY_EPOCH)
    for run, tag in series:
        if run in ("test", "validation") and not tag.startswith(_NOT_METRICS):
            places.setdefault(f"{run}/{tag}", (run, tag))
    for name, place in places.items():
        if place in series:
            values = series[place]
            x = [float(epoch) for epoch in range(1, len(values) + 1)]
            if epochs and epochs[0] and len(values) != len(epochs):  # evaluated more often, or less
                x = [step / epochs[0] for step in steps[place]]
            curves[name] = x, values
    return curves


def _fits_of_keras(scalars: list) -> list[Series]:
    """Those in one folder of Keras's callback, whose tags are epoch_loss, epoch_accuracy …

    The training tells where a fit begins; what else is measured belongs to the fit that had begun
    when it was written.
    """
    fits: list[dict[str, tuple[list[float], list[float]]]] = []
    last: dict[str, tuple[int, int]] = {}  # name → (fit, step)
    began: list[float] = []  # the time of each fit's first point
    of_training = [scalar for scalar in scalars if os.path.basename(scalar.run) == "train"]
    others = [scalar for scalar in scalars if os.path.basename(scalar.run) in _PARTS[1:]]
    for scalar in (*of_training, *others):
        if not scalar.tag.startswith("epoch_"):
            continue
        part = os.path.basename(scalar.run)
        name = f"{part}/{scalar.tag.removeprefix('epoch_')}"
        fit, step = last.get(name, (0, -1))
        if part == "train" or not of_training:
            fit += scalar.step <= step
        else:
            fit = max(0, sum(time <= scalar.wall_time for time in began) - 1)
        last[name] = fit, scalar.step
        while len(fits) <= fit:
            fits.append({})
            began.append(scalar.wall_time)
        x, y = fits[fit].setdefault(name, ([], []))
        x.append(float(scalar.step))
        y.append(scalar.value)
    return [_with_accuracy(fit) for fit in fits]


def _with_accuracy(fit: dict) -> Series:
    """The series with the only accuracy, of whatever name, as "accuracy", too."""
    names = {name.partition("/")[2] for name in fit}
    found = [name for name in names if name == "acc" or name.endswith(("_acc", "accuracy"))]
    if "accuracy" in names or len(found) != 1:
        return fit
    copies = {name: xy for name, xy in fit.items() if name.partition("/")[2] == found[0]}
    return {**fit, **{f"{name.partition('/')[0]}/accuracy": xy for name, xy in copies.items()}}


class LivePlot:
    """`curves` of a run while it goes on, in a PNG file, or in place in a notebook.

    It is redrawn after every epoch.

    Example:
      >>> plot = LivePlot()
      >>> for record in loop.run(epochs=20):
      ...     plot.write(record)
    """

    def __init__(
        self,
        path: str | Path | None = None,
        reference: float | None = None,
        before: Sequence[dict] = (),
    ) -> None:
        """Make one.

        Args:
          path: the file; None in a notebook.
          reference: an accuracy to draw a line at.
          before: epochs that were drawn before, as in result.json.

        Raises:
          UserError: no path, and no notebook.
        """
        self._path, self._reference = path, reference
        self._series: dict[str, tuple[list[float], list[float]]] = {}
        self._shown: Any = None
        if path is None and not importlib.util.find_spec("IPython"):
            raise UserError(
                "LivePlot without a path redraws in a notebook, and IPython is not installed; give "
                "it a path"
            )
        for epoch in before:
            self._add(epoch["epoch"], epoch["train"], epoch.get("test"))

    def _add(self, epoch: int, train: dict, test: dict | None) -> None:
        for part, metrics in (("train", train), ("test", test)):
            if metrics:
                for name, value in metrics.items():
                    is_drawn = name in ("accuracy", "total") or name not in NAMES
                    if value is None or not is_drawn:
                        continue
                    what = "loss" if name == "total" else name
                    x, y = self._series.setdefault(f"{part}/{what}", ([], []))
                    x.append(epoch)
                    y.append(value)

    def write(self, record: Any) -> None:
        """An Epoch is drawn; any other record is let pass."""
        if not hasattr(record, "test"):
            return
        test = record.test.by_name() if record.test else None
        self._add(record.epoch, record.train.by_name(), test)
        figure = curves({"": self._series}, self._reference)
        if self._path:
            save(figure, self._path)
            return
        from IPython.display import display

        if self._shown:
            self._shown.update(figure)
        else:
            self._shown = display(figure, display_id=True)


def confusion(
    labels: np.ndarray, guesses: np.ndarray, classes: int, names: Sequence[str] = ()
) -> bytes:
    """Counts by true class (rows) and predicted class, as PNG.

    Colour shows the errors, which the diagonal would drown.

    Args:
      labels: [N] true class numbers.
      guesses: [N] predicted ones.
      classes: how many there are.
      names: of the classes; () for their numbers.
    """
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(labels, guesses, labels=range(classes))
    errors = np.where(np.eye(classes, dtype=bool), 0, counts)
    side = min(max(4.0, 0.55 * classes + 1), 14.0)
    figure, axes = _figure(size=(side, side), layout="none")
    axes.imshow(errors, cmap="OrRd", vmin=0, vmax=max(errors.max(), 1) * 1.3)
    axes.grid(False)
    if classes <= 30:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                weight = "bold" if row == column else None
                center = {"ha": "center", "va": "center"}
                axes.text(column, row, count, fontsize=9, fontweight=weight, **center)
        axes.set(xticks=range(classes), yticks=range(classes))
        if names:
            names = [_plain(name) for name in names]
            axes.set_xticklabels(names, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticklabels(names)
            figure.set_layout_engine("constrained")
    title = f"{errors.sum()} of {len(labels)} wrong"
    axes.set(xlabel="predicted", ylabel="true", title=title)
    return _png(figure)


def misclassified(images: np.ndarray, labels: Sequence[Any], guesses: Sequence[Any]) -> bytes:
    """Images that the model got wrong, each with its true and its predicted class, as PNG."""
    columns, (height, width) = min(5, len(images)), images.shape[1:3]
    gap = math.ceil(0.25 * height)  # above each image, for its line of text
    filling = -len(images) % columns
    tiles = np.pad(to_visible(images), ((0, filling), (gap, 0), (1, 1), (0, 0)))
    rows = math.ceil(len(images) / columns)
    size = (1.4 * columns, 1.4 * (height + gap) / width * rows)
    figure, axes = _figure(size=size, layout="none")
    figure.subplots_adjust(0, 0, 1, 1)
    axes.imshow(tiled(tiles, columns), cmap="gray")
    axes.axis("off")
    for i, (label, guess) in enumerate(zip(labels, guesses, strict=True)):
        x, y = (i % columns + 0.5) * (width + 2), i // columns * (height + gap) + gap / 2
        text = _plain(f"{label}, taken for {guess}")
        axes.text(x, y, text, ha="center", va="center", fontsize=9, color="white")
    return _png(figure)


def tensor(array: np.ndarray, as_images: bool) -> bytes:
    """Numbers as PNG: images side by side, a curve of [n] with n up to 1000, else a histogram."""
    figure, axes = _figure(size=(6.4, 4.4))
    if as_images:
        images = array.reshape((-1, *array.shape[-3:]))[:25]
        columns = min(5, len(images))
        filling = ((0, -len(images) % columns), (1, 1), (1, 1), (0, 0))
        axes.imshow(tiled(np.pad(to_visible(images), filling), columns), cmap="gray")
        axes.axis("off")
    elif array.ndim == 1 and array.size <= 1000:
        axes.plot(array, ".-")
    else:
        values = array.astype(np.float64).reshape(-1)
        axes.hist(values[np.isfinite(values)], bins=60)
        axes.set(yscale="log", ylabel="values")
    axes.set_title(f"{array.dtype} [{', '.join(map(str, array.shape))}]")
    return _png(figure)


def report(rows: Sequence[Any]) -> Any:
    """Mean test accuracy by epoch, and every seed by protocol, from `experiments.Row`s.

    Returns:
      A matplotlib Figure.
    """
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = _figure(2, (11, 4.6))
    presets = list(dict.fromkeys(row.preset for row in rows))
    for place, row in enumerate(rows):
        colour = COLOURS[presets.index(row.preset) % len(COLOURS)]
        if row.protocol == "clean":
            _draw_epochs(left, row, colour)
        _draw_seeds(right, row, -place, colour)
    accuracies = [100 * value for row in rows for epochs in row.by_epoch for value in epochs]
    low = max(min(accuracies) - 0.1, max(accuracies) - 3)
    left.set(title="clean: test accuracy, %, mean and range over seeds", xlabel="epoch")
    left.set(ylim=(low, None))
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(loc="lower right", fontsize=8)
    right.set(title="every seed, and the mean", xlabel="test accuracy, %")
    right.set(ylim=(-len(rows) + 0.3, 0.8))
    labels = [f"{row.preset}\n{row.protocol}" for row in rows]
    right.set_yticks([-place for place in range(len(rows))], labels, fontsize=8)
    claims = (
        (99.0, ":", "99.0, says the article of 5 epochs"),
        (99.35, "--", "99.35, of up to 80, on average"),
    )
    for claim, style, what in claims:
        right.axvline(claim, color=GREY, linewidth=1, linestyle=style, label=what, zorder=0)
    handles, _ = right.get_legend_handles_labels()
    where = {"loc": "outside lower right", "ncols": 2}
    figure.legend(handles=handles, fontsize=8, frameon=False, **where)
    return figure


def _draw_epochs(axes: Any, row: Any, colour: str) -> None:
    """An experiment's accuracy over epochs: the mean and the range over seeds."""
    epochs, by_seed = np.arange(1, row.epochs + 1), 100 * np.array(row.by_epoch)
    marker = "o" if row.epochs < 12 else None
    style = {"color": colour, "linewidth": 1.8, "marker": marker, "markersize": 3}
    axes.plot(epochs, by_seed.mean(axis=0), label=row.preset, **style)
    low, high = by_seed.min(axis=0), by_seed.max(axis=0)
    axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)


def _draw_seeds(axes: Any, row: Any, y: int, colour: str) -> None:
    """What the protocol reports for each seed, and the mean, along a line."""
    claimed = 100 * np.array(row.claimed)
    mean = claimed.mean()
    axes.plot(claimed, np.full(len(claimed), y), "o", color=colour, alpha=0.6, markersize=5)
    axes.plot([mean] * 2, [y - 0.3, y + 0.3], color=colour, linewidth=2)
    place = {"ha": "center", "va": "bottom"}
    axes.annotate(f"{mean:.2f}", (mean, y + 0.32), fontsize=8, color=colour, **place)


def evaluation(
    calibration: Any,
    images: np.ndarray,
    labels: Sequence[Any],
    guesses: Sequence[Any],
    confidence: np.ndarray,
    noun: str = "images",
) -> Any:
    """Calibration beside the most confident mistakes, where they are images.

    Args:
      calibration: an `evaluation.Calibration`.
      images: of the mistakes, at most ten.
      labels: their true classes.
      guesses: their predicted classes.
      confidence: the probabilities of these.
      noun: what the examples are called.

    Returns:
      A matplotlib Figure.
    """
    from matplotlib.figure import Figure

    if not len(images):
        figure = Figure(figsize=(5, 4.2), layout="constrained")
        _draw_calibration(figure, calibration, noun)
        return figure
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 3))  # type: ignore[misc]  # an array
    _draw_calibration(left, calibration, noun)
    tiles = right.subplots(2, 5)
    for axes in tiles.flat:
        axes.axis("off")
    mistakes = zip(to_visible(images), labels, guesses, confidence, strict=True)
    for axes, (image, label, guess, share) in zip(tiles.flat, mistakes, strict=False):
        axes.imshow(image, cmap="gray")
        text = _plain(f"{label}, taken for {guess}")
        axes.set_title(f"{text}\n{100 * share:.1f} % sure", fontsize=8)
    right.suptitle("most confident mistakes", fontsize=11)
    return figure


def predicted(true: np.ndarray, given: np.ndarray) -> Any:
    """Predicted against true values, and how the errors lie.

    Args:
      true: [N] the targets.
      given: [N] what the model gives.

    Returns:
      A matplotlib Figure.
    """
    figure, (left, right) = _figure(2, (11, 4.6))
    error = given - true
    ends = [min(true.min(), given.min()), max(true.max(), given.max())]
    alpha = float(np.clip(300 / len(true), 0.05, 0.7))
    left.plot(ends, ends, color=GREY, linewidth=1, linestyle=":")
    left.plot(true, given, "o", color=COLOURS[0], alpha=alpha, markersize=4, markeredgewidth=0)
    left.set(title="predicted against true", xlabel="true", ylabel="predicted")
    right.hist(error, bins=min(60, max(10, len(true) // 10)), color=COLOURS[0])
    right.axvline(0, color=GREY, linewidth=1, linestyle=":")
    rmse = float(np.sqrt(np.mean(np.square(error))))
    right.set(title=f"error: RMSE {rmse:.4g}", xlabel="predicted - true", ylabel="examples")
    return figure


def _draw_calibration(figure: Any, calibration: Any, noun: str) -> None:
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":")
    confidence, accuracy = calibration.confidence, calibration.accuracy
    few = (calibration.images > 0) & (calibration.images < FEW)
    many = calibration.images >= FEW
    axes.plot(confidence[many], accuracy[many], "o-", color=COLOURS[0])
    hollow = {"markerfacecolor": "white", "label": f"fewer than {FEW} {noun}"}
    axes.plot(confidence[few], accuracy[few], "o", color=COLOURS[0], **hollow)
    if few.any():
        axes.legend(loc="upper left", fontsize=8)
    bins = len(calibration.images)
    title = f"expected calibration error {100 * calibration.error:.2f} %, {bins} bins"
    axes.set(title=title, ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.04))
    axes.grid(alpha=0.3)
    middles = (np.arange(bins) + 0.5) / bins
    below.bar(middles, calibration.images, 0.9 / bins, color=COLOURS[0])
    below.set(xlabel="confidence", ylabel=noun, yscale="log", ylim=(0.7, None))


def profile(found: Any, title: str, path: str | Path) -> None:
    """A `step_profile.Profile` as bars: ms of each layer, forward, backward and update."""
    rows, left = found.rows, np.zeros(len(found.rows))
    figure, axes = _figure(size=(8, 0.28 * len(rows) + 1.6))
    for index, way in enumerate(("forward", "backward", "update")):
        values = np.array([getattr(row, way) for row in rows])
        axes.barh(range(len(rows)), values, left=left, color=COLOURS[index], label=way)
        left = left + values
    axes.set_yticks(range(len(rows)), [_plain(row.layer) for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower right", frameon=False)
    axes.set(xlabel="ms a step, of all threads together", xlim=(0, 1.05 * max(left)))
    axes.set_title(
        _plain(f"{title}") + f": {found.step:.3g} ms a step\n{found.verdict}", fontsize=10
    )
    save(figure, path)


def save(figure: Any, path: str | Path) -> None:
    """Write a Figure to a PNG file, whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with _without_glyph_warnings():
            figure.savefig(partial, format="png", dpi=120)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _plain(text: str) -> str:
    """A text of the user's, to be drawn as it is: matplotlib takes $ for mathematics, and leaves
    labels that begin with _ out of a legend."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


@contextlib.contextmanager
def _without_glyph_warnings() -> Iterator[None]:
    """A sign that the font lacks is drawn as a box, which the reader sees."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _figure(
    axes: int = 1, size: tuple[float, float] = (7, 4), layout: Any = "constrained"
) -> tuple[Any, Any]:
    """A Figure and its axes: one, or an array of several."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout=layout)
    subplots = figure.subplots(1, axes)
    for each in np.atleast_1d(subplots):
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    return figure, subplots


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    with _without_glyph_warnings():
        figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()
