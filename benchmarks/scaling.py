"""How time and memory grow with batch size, width, number of images, image size and threads.

cost = a · size^b: b = 1 is proportional. Batch, width and image size: ms per step. Images: seconds
per epoch, and peak memory with the images resident and streamed. A process of its own for every
point; the points of a curve take turns.
"""

import os
import tempfile
from pathlib import Path

from race import (
    Contender,
    arguments,
    describe,
    environment,
    exponent,
    race,
    save,
    table,
    with_interval,
)


def curves(folder: Path, cores: int) -> dict[str, dict[float, dict]]:
    """name → size → settings."""
    sizes = {size: {"dataset": images(folder, 8192, size)} for size in (20, 28, 40, 56)}
    counts = {
        count: {"dataset": images(folder, count, 28)} for count in (8192, 16384, 32768, 65536)
    }
    return {
        "batch size": {n: {"batch_size": n} for n in (32, 64, 128, 256, 512)},
        "width (× article2)": {
            w: {"conv": [int(32 * w), int(64 * w), int(64 * w)], "dense": [int(70 * w)]}
            for w in (0.5, 1, 2)
        },
        "image side": {size: {**settings, "pool": [2, 2]} for size, settings in sizes.items()},
        "images, resident": {
            n: {**settings, "pipeline": "resident"} for n, settings in counts.items()
        },
        "images, host": {n: {**settings, "pipeline": "host"} for n, settings in counts.items()},
        "threads": {
            n: {"shards": n, "intra_op_threads": 1, "inter_op_threads": n}
            for n in range(1, cores + 1)
        },
    }


def images(folder: Path, count: int, side: int) -> str:
    """An .npz of random images, as large as asked for."""
    import numpy as np

    path = folder / f"{count}-{side}.npz"
    if not path.exists():
        chance = np.random.default_rng(0)
        x = chance.integers(0, 256, (count, side, side), np.uint8)
        np.savez(
            path, x_train=x, y_train=np.arange(count) % 10, x_test=x[:64], y_test=np.arange(64) % 10
        )
    return str(path)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], rounds=3, seconds=0.7)
    parser.add_argument("--only", default="", help="a part of the curves' names")
    options = parser.parse_args()
    found = environment()
    rows, results = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name, points in curves(Path(folder), found["cores"]).items():
            if options.only not in name:
                continue
            contenders = {size: Contender("tfloop", settings) for size, settings in points.items()}
            race(list(contenders.values()), options.seconds, options.rounds)
            times, memory = {}, {}
            for size, contender in contenders.items():
                contender.close()
                ms = with_interval(contender.turns)[0]
                times[size] = ms * size / 64 / 1000 if name.startswith("images") else ms
                memory[size] = contender.memory
            fitted = exponent(list(times), list(times.values())) if len(times) > 1 else None
            results[name] = {"time": times, "memory_mib": memory, "exponent": fitted}
            unit = "s/epoch" if name.startswith("images") else "ms/step"
            rows.append(
                [
                    name,
                    "  ".join(f"{size}: {value:.2f}" for size, value in times.items()) + f" {unit}",
                    f"{fitted:.2f}" if fitted is not None else "",
                    "  ".join(f"{value:.0f}" for value in memory.values()),
                ]
            )
    print(describe(found) + "\n")
    print(table(["grows", "time", "exponent", "peak memory, MiB"], rows))
    save("scaling", options.out, {"environment": found, "results": results})
    if options.plot:
        plot(results, Path(options.out) / "scaling.png")


def plot(results: dict, path: Path) -> None:
    """Time against size on logarithmic axes, each curve as a multiple of its first point."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, curve in results.items():
        sizes, times = list(curve["time"]), list(curve["time"].values())
        if len(sizes) > 1 and name != "threads":
            axes.plot(
                [size / sizes[0] for size in sizes],
                [time / times[0] for time in times],
                marker="o",
                label=f"{name}: exponent {curve['exponent']:.2f}",
            )
    axes.plot([1, 16], [1, 16], color="#888888", linewidth=1, linestyle=":", label="proportional")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="size, as a multiple of the smallest",
        ylabel="time, as a multiple",
        title="How the time grows",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(base=2))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    print(f"written: {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
