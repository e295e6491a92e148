"""Plots as PNG files."""

from pathlib import Path

import numpy as np

from tfloop.errors import UserError


def schedule(rate_at, steps: int, total: int, title: str, path: str | Path) -> None:
    """The rate over a run of `total` steps, with epochs of `steps` steps along the axis."""
    figure, axes = _figure()
    at = np.unique(np.linspace(0, total - 1, 2000).astype(int))
    rates = [float(rate_at(step)) for step in at]
    axes.plot(at / steps, rates, color="#1f5fa8")
    axes.set(title=title, xlabel="epoch", ylabel="learning rate", xlim=(0, total / steps), ylim=(0, 1.08 * max(rates) or 1))
    axes.annotate(f"{rates[-1]:.3g} at step {total - 1}", (at[-1] / steps, rates[-1]), xytext=(-6, 10), ha="right",
                  textcoords="offset points")
    _save(figure, path)


def _figure():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure, path: str | Path) -> None:
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise UserError(f"--plot={path}: cannot be written: {error.strerror}") from None
