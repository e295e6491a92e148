"""Pictures, as PNG files or as PNG bytes for TensorBoard."""

import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tfloop.errors import UserError

COLOURS = ("#1f5fa8", "#c05020", "#3a8a4d", "#7a4fa0", "#a08020", "#606a75")
FEW = 20  # images in a bin, whose share is then hardly known


def schedule(rate_at, steps: int, total: int, title: str, path: str | Path) -> None:
    """The rate over a run of `total` steps, with epochs of `steps` steps along the axis."""
    figure, axes = _figure()
    at = np.unique(np.linspace(0, total - 1, 2000).astype(int))
    rates = [float(rate_at(step)) for step in at]
    axes.plot(at / steps, rates, color=COLOURS[0])
    axes.set(title=title, xlabel="epoch", ylabel="learning rate", xlim=(0, total / steps), ylim=(0, 1.08 * max(rates) or 1))
    axes.annotate(f"{rates[-1]:.3g} at step {total - 1}", (at[-1] / steps, rates[-1]), xytext=(-6, 10), ha="right",
                  textcoords="offset points")
    save(figure, path)


def range_test(found, title: str, path: str | Path) -> None:
    """The loss over the rate, from a `lr_find.RangeTest`, with what it suggests."""
    figure, axes = _figure()
    axes.plot(found.rates, found.losses, color=COLOURS[0], linewidth=0.6, alpha=0.4, label="loss of each step's batch")
    axes.plot(found.rates, found.smoothed, color=COLOURS[0], linewidth=1.8, label="smoothed")
    for rate, what, side in ((found.suggestion, "falls fastest", "right"), (found.least, "least", "left")):
        axes.axvline(rate, color=COLOURS[1], linewidth=1, linestyle=":" if what == "least" else "--")
        axes.annotate(f"{what}: {rate:.2g}", (rate, 1), xycoords=("data", "axes fraction"), xytext=(-4 if side == "right" else 4, -12), ha=side,
                      textcoords="offset points", color=COLOURS[1])
    axes.set(title=title, xlabel="learning rate", ylabel="loss", xscale="log", ylim=(0, 1.3 * found.smoothed[:10].max()))
    axes.legend(loc="lower left", fontsize=8)
    save(figure, path)


def curves(runs: Mapping[str, Mapping[str, tuple[list[float], list[float]]]], reference: float | None = None,
           along: str = "epoch"):
    """Accuracy and loss over epochs, side by side, several runs overlaid: the article's figure, as a matplotlib Figure.

    Args:
      runs: name of the run → "train/accuracy", "test/accuracy", "train/loss", "test/loss" → (x, y).
      reference: an accuracy to draw a line at.
      along: what x counts.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator

    figure, (left, right) = _figure(2, (11, 4.2))
    for colour, (name, found) in zip((COLOURS[i % len(COLOURS)] for i in range(len(runs))), runs.items()):
        for axes, what in ((left, "accuracy"), (right, "loss")):
            for part, style in (("train", "--"), ("test", "-")):
                x, y = found.get(f"{part}/{what}", ([], []))
                label = f"{name}{', ' * bool(name)}{part}" + (f": {100 * y[-1]:.2f} %" if what == "accuracy" and y else "")
                axes.plot(x, y, style, color=colour, linewidth=1 if part == "train" else 1.8, label=label,
                          marker="o" if 0 < len(x) < 12 else None, markersize=3)
    accuracies = [y for found in runs.values() for key, (_, ys) in found.items() if key.endswith("accuracy") for y in ys]
    if reference is not None:
        left.axhline(reference, color="#888888", linewidth=1, linestyle=":")
        left.annotate(f"{100 * reference:.2f} %", (0, reference), xycoords=("axes fraction", "data"), xytext=(4, 3),
                      textcoords="offset points", color="#666666")
        accuracies.append(reference)
    accuracies = [value for value in accuracies if math.isfinite(value)]
    if accuracies:  # from the middle of the first climb on: the rest is decided in the last per cent
        low = max(min(accuracies), 1 - 8 * (1 - max(accuracies)) - 0.01)
        left.set_ylim(low - 0.03 * (1 - low) - 1e-4, min(1.0, max(accuracies)) + 0.05 * (1 - low) + 1e-4)
    left.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.6g} %")
    left.set(title="accuracy", xlabel=along)
    right.set(title="loss", xlabel=along)
    if all(value > 0 for line in right.lines for value in line.get_ydata()):
        right.set(yscale="log", title="loss, logarithmic")
        right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.yaxis.set_minor_formatter("")
    right.yaxis.set_major_formatter("{x:g}")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(fontsize=8, loc="lower right")
    return figure


def by_epoch(scalars: list, where: str) -> dict[str, tuple[list[float], list[float]]]:
    """What `curves` draws of one run, from the scalars of its event files; those that Keras's callback writes are known.

    Raises:
      UserError: there is no accuracy or loss by epoch among them.
    """
    sources = {"train/accuracy": [("train", "epoch_accuracy")], "train/loss": [("train", "epoch_loss")],
               "test/accuracy": [("test", "accuracy"), ("validation", "epoch_accuracy")],
               "test/loss": [("test", "loss/total"), ("validation", "epoch_loss")]}
    series = {}
    for scalar in scalars:
        series.setdefault((scalar.run, scalar.tag), []).append(scalar.value)
    found = {}
    for name, places in sources.items():
        values = next((series[place] for place in places if place in series), None)
        if values:
            found[name] = list(range(1, len(values) + 1)), values
    if not found:
        tags = sorted({f"{run}/{tag}" for run, tag in series})
        raise UserError(f"{where}: holds no accuracy or loss by epoch; it holds "
                        f"{', '.join(tags[:6]) + ' …' * (len(tags) > 6) if tags else 'no scalars'}")
    return found


class LivePlot:
    """`curves` of a run while it goes on: redrawn after every epoch, in a PNG file, or in place in a notebook.

    Example:
      >>> plot = LivePlot()
      >>> for record in loop.run(epochs=20):
      ...     plot.write(record)
    """

    def __init__(self, path: str | Path | None = None, reference: float | None = None, before: Sequence[dict] = ()):
        """Args: the file, None in a notebook; an accuracy to draw a line at; epochs before, as in result.json."""
        self._path, self._reference, self._found, self._shown = path, reference, {}, None
        if path is None and not importlib.util.find_spec("IPython"):
            raise UserError("LivePlot without a path redraws in a notebook, and IPython is not installed; give it a path")
        for epoch in before:
            self._add(epoch["epoch"], epoch["train"], epoch.get("test"))

    def _add(self, epoch: int, train: dict, test: dict | None) -> None:
        for part, metrics in (("train", train), ("test", test)) if test else (("train", train),):
            for what, value in (("accuracy", metrics["accuracy"]), ("loss", metrics["total"])):
                x, y = self._found.setdefault(f"{part}/{what}", ([], []))
                x.append(epoch)
                y.append(value)

    def write(self, record) -> None:
        """An Epoch is drawn; any other record is let pass."""
        if not hasattr(record, "test"):
            return
        self._add(record.epoch, record.train._asdict(), record.test and record.test._asdict())
        figure = curves({"": self._found}, self._reference)
        if self._path:
            save(figure, self._path)
            return
        from IPython.display import display

        if self._shown:
            self._shown.update(figure)
        else:
            self._shown = display(figure, display_id=True)


def confusion(labels: np.ndarray, guesses: np.ndarray, classes: int) -> bytes:
    """Counts by true class (rows) and predicted class; colour shows the errors, which the diagonal would drown."""
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(labels, guesses, labels=range(classes))
    errors = np.where(np.eye(classes, dtype=bool), 0, counts)
    figure, axes = _figure(size=(min(max(4.0, 0.55 * classes + 1), 14.0),) * 2, layout="none")
    axes.imshow(errors, cmap="OrRd", vmin=0, vmax=max(errors.max(), 1) * 1.3)
    axes.grid(False)
    if classes <= 30:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                axes.text(column, row, count, ha="center", va="center", fontsize=9, fontweight="bold" if row == column else None)
        axes.set(xticks=range(classes), yticks=range(classes))
    axes.set(xlabel="predicted", ylabel="true", title=f"{errors.sum()} of {len(labels)} wrong")
    return _png(figure)


def misclassified(images: np.ndarray, labels: np.ndarray, guesses: np.ndarray) -> bytes:
    """Images that the model got wrong, each with its true and its predicted class."""
    columns, (height, width) = min(5, len(images)), images.shape[1:3]
    gap = math.ceil(0.25 * height)  # above each image, for its line of text
    tiles = np.pad(_visible(images), ((0, -len(images) % columns), (gap, 0), (1, 1), (0, 0)))
    figure, axes = _figure(size=(1.4 * columns, 1.4 * (height + gap) / width * math.ceil(len(images) / columns)), layout="none")
    figure.subplots_adjust(0, 0, 1, 1)
    axes.imshow(_tiled(tiles, columns), cmap="gray")
    axes.axis("off")
    for i, (label, guess) in enumerate(zip(labels, guesses)):
        axes.text((i % columns + 0.5) * (width + 2), i // columns * (height + gap) + gap / 2, f"{label}, taken for {guess}",
                  ha="center", va="center", fontsize=9, color="white")
    return _png(figure)


def report(rows: Sequence):
    """Mean test accuracy by epoch, and every seed by protocol, as a matplotlib Figure; from `reports.Row`s."""
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = _figure(2, (11, 4.6))
    presets = list(dict.fromkeys(row.preset for row in rows))
    labels = []
    for place, row in enumerate(rows):
        colour = COLOURS[presets.index(row.preset) % len(COLOURS)]
        epochs, each = np.arange(1, row.epochs + 1), 100 * np.array(row.by_epoch)
        if row.protocol == "clean":
            left.plot(epochs, each.mean(axis=0), color=colour, linewidth=1.8, marker="o" if row.epochs < 12 else None, markersize=3, label=row.preset)
            left.fill_between(epochs, each.min(axis=0), each.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        claimed = 100 * np.array(row.claimed)
        right.plot(claimed, np.full(len(claimed), -place), "o", color=colour, alpha=0.6, markersize=5)
        right.plot([claimed.mean()] * 2, [-place - 0.3, -place + 0.3], color=colour, linewidth=2)
        right.annotate(f"{claimed.mean():.2f}", (claimed.mean(), -place + 0.32), ha="center", va="bottom", fontsize=8, color=colour)
        labels.append(f"{row.preset}\n{row.protocol}")
    low = min(100 * value for row in rows for epochs in row.by_epoch for value in epochs)
    left.set(title="clean: test accuracy, %, mean and range over seeds", xlabel="epoch", ylim=(max(low - 0.1, 100 * max(max(epochs) for row in rows for epochs in row.by_epoch) - 3), None))
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(loc="lower right", fontsize=8)
    right.set(title="every seed, and the mean", xlabel="test accuracy, %", ylim=(-len(rows) + 0.3, 0.8))
    right.set_yticks([-place for place in range(len(rows))], labels, fontsize=8)
    for claim, style, what in ((99.0, ":", "99.0, says the article of 5 epochs"), (99.35, "--", "99.35, of up to 80, on average")):
        right.axvline(claim, color="#888888", linewidth=1, linestyle=style, label=what, zorder=0)
    figure.legend(handles=right.get_legend_handles_labels()[0], loc="outside lower right", ncols=2, fontsize=8, frameon=False)
    return figure


def evaluation(calibration, images: np.ndarray, labels: np.ndarray, guesses: np.ndarray, confidence: np.ndarray):
    """Calibration beside the most confident mistakes, as a matplotlib Figure; from an `evaluation.Calibration`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 3))
    (axes, below), there = left.subplots(2, 1, sharex=True, height_ratios=(3, 1)), calibration.images > 0
    axes.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle=":")
    few = there & (calibration.images < FEW)
    axes.plot(calibration.confidence[there & ~few], calibration.accuracy[there & ~few], "o-", color=COLOURS[0])
    axes.plot(calibration.confidence[few], calibration.accuracy[few], "o", color=COLOURS[0], markerfacecolor="white", label=f"fewer than {FEW} images")
    if few.any():
        axes.legend(loc="upper left", fontsize=8)
    axes.set(title=f"expected calibration error {100 * calibration.error:.2f} %, {len(calibration.images)} bins", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.04))
    bins = len(calibration.images)
    below.bar((np.arange(bins) + 0.5) / bins, calibration.images, 0.9 / bins, color=COLOURS[0])
    below.set(xlabel="confidence", ylabel="images", yscale="log", ylim=(0.7, None))
    axes.grid(alpha=0.3)
    if len(images):
        tiles = right.subplots(2, 5)
        for axes in tiles.flat:
            axes.axis("off")
        for axes, image, label, guess, share in zip(tiles.flat, _visible(images), labels, guesses, confidence):
            axes.imshow(image, cmap="gray")
            axes.set_title(f"{label}, taken for {guess}\n{100 * share:.1f} % sure", fontsize=8)
        right.suptitle("most confident mistakes", fontsize=11)
    return figure


def filters(kernel: np.ndarray) -> bytes:
    """The filters of a kernel [height, width, channels, filters]: grey or in colour, each scaled on its own."""
    kernel = np.moveaxis(kernel, -1, 0)
    if kernel.shape[-1] not in (1, 3):
        kernel = kernel.mean(axis=-1, keepdims=True)
    return _encode(_grid(kernel, columns=8, zoom=max(1, 48 // kernel.shape[1])))


def feature_maps(activation: np.ndarray, channels: int = 16) -> bytes:
    """[images, height, width, channels]: a row for each image, a column for each of the first channels."""
    maps = np.moveaxis(activation[..., :channels], -1, 1)
    columns = maps.shape[1]
    maps = maps.reshape(-1, *maps.shape[2:], 1)
    return _encode(_grid(maps, columns, zoom=max(1, 56 // maps.shape[1])))


def sprite(images: np.ndarray) -> bytes:
    """Thumbnails, row by row, as the projector wants them: as many columns as rows."""
    images = _visible(images)
    side = math.ceil(math.sqrt(len(images)))
    sheet = np.zeros((side * side, *images.shape[1:]), np.uint8)
    sheet[:len(images)] = images
    return _encode(_tiled(sheet, side))


def save(figure, path: str | Path) -> None:
    """Write a Figure to a PNG file, whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        figure.savefig(partial, format="png", dpi=120)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _figure(axes: int = 1, size=(7, 4), layout: str = "constrained"):
    """A Figure and its axes: one, or an array of several."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout=layout)
    found = figure.subplots(1, axes)
    for each in np.atleast_1d(found):
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    return figure, found


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


def _encode(pixels: np.ndarray) -> bytes:
    import tensorflow as tf

    return tf.io.encode_png(pixels).numpy()


def _visible(images: np.ndarray) -> np.ndarray:
    """uint8, grey or in colour, from the darkest value of all images to the brightest."""
    images = images if images.shape[-1] in (1, 3) else images.mean(axis=-1, keepdims=True)
    low, high = float(images.min()), float(images.max())
    return (255 * (images - low) / max(high - low, 1e-12)).astype(np.uint8)


def _grid(tiles: np.ndarray, columns: int, zoom: int) -> np.ndarray:
    """uint8 picture of float tiles [n, height, width, channels], each scaled to its own range, with lines between."""
    low, high = tiles.min(axis=(1, 2, 3), keepdims=True), tiles.max(axis=(1, 2, 3), keepdims=True)
    tiles = (255 * (tiles - low) / np.maximum(high - low, 1e-12)).astype(np.uint8)
    tiles = np.pad(tiles.repeat(zoom, axis=1).repeat(zoom, axis=2), ((0, -len(tiles) % columns), (1, 1), (1, 1), (0, 0)),
                   constant_values=64)
    return _tiled(tiles, columns)


def _tiled(tiles: np.ndarray, columns: int) -> np.ndarray:
    n, height, width, channels = tiles.shape
    rows = tiles.reshape(n // columns, columns, height, width, channels)
    return rows.transpose(0, 2, 1, 3, 4).reshape(-1, columns * width, channels)
