"""Accuracy on the test images after the last epoch, and the time to reach a given one, over several
seeds."""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from race import HERE, arguments, describe, environment, save, table


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--target", type=float, default=0.99, help="test accuracy to reach")
    parser.add_argument(
        "--seeds",
        default="0,1,2,3,4",
        help="with a preset that is an ensemble of K, seed 1 is its members' seeds K to 2K - 1",
    )
    parser.add_argument("--epochs", type=int, default=0, help="0: the preset's")
    parser.add_argument("--preset", default="article2")
    parser.add_argument("--set", action="append", default=[], help="another setting, NAME=VALUE")
    options = parser.parse_args()
    from tfloop.config import Config

    changes = dict(part.split("=", 1) for part in options.set) | (
        {"epochs": options.epochs} if options.epochs else {}
    )
    config = Config.make(options.preset, **changes)
    members, seeds = config.ensemble, [int(seed) for seed in options.seeds.split(",")]
    own = [seed * members + member for seed in seeds for member in range(members)]
    flags = [
        f"--preset={options.preset}",
        *(f"--{name}={value}" for name, value in changes.items()),
        f"--seeds={','.join(map(str, own))}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "tfloop", "train", *flags, f"--logdir={folder}", "--quiet"],
            check=True,
            cwd=HERE.parent,
        )
        runs = [
            json.loads((path / "result.json").read_text())
            for path in sorted(Path(folder).iterdir())
        ]
    results, rows = [], []
    for index, seed in enumerate(seeds):
        group = runs[index * members : (index + 1) * members]
        accuracy = (
            group[0]["together"]["test_accuracy"]
            if members > 1
            else group[0]["final"]["test"]["accuracy"]
        )
        # Members share the time of their calls.
        seconds = sum(run["seconds"]["training"] for run in group)
        until = (
            reached(group[0], options.target)
            if members == 1
            else seconds
            if accuracy >= options.target
            else None
        )
        results.append(
            {
                "seed": seed,
                "accuracy": accuracy,
                "seconds": seconds,
                "seconds_to_target": until,
                "members": [run["final"]["test"]["accuracy"] for run in group],
            }
        )
        rows.append(
            [
                seed,
                f"{100 * accuracy:.2f} %",
                f"{seconds:.1f}",
                f"{until:.1f}" if until is not None else "not reached",
            ]
        )
    found, final = environment(), [result["accuracy"] for result in results]
    weights, steps = runs[0]["weights"], runs[0]["steps"]
    print(
        f"{describe(found)}\n`train {' '.join(flags)}`: {config.epochs} epochs, {steps} "
        f"steps, {members} × {weights:,} weights\n"
    )
    print(
        table(
            [
                "seed",
                "test accuracy, last epoch",
                "s of training",
                f"s until an epoch ended at {100 * options.target:g} %",
            ],
            rows,
        )
    )
    times = [
        result["seconds_to_target"] for result in results if result["seconds_to_target"] is not None
    ]
    print(
        f"\nmean {100 * statistics.fmean(final):.3f} %, standard deviation "
        f"{100 * statistics.stdev(final) if len(final) > 1 else 0:.3f}, median of "
        f"{statistics.median(result['seconds'] for result in results):.1f} s of training; "
        f"{100 * options.target:g} % reached by {len(times)} of "
        f"{len(seeds)} seeds"
        + (f", in {statistics.fmean(times):.1f} s on average" if times else "")
    )
    save(
        "-".join(
            [
                "accuracy",
                *([options.preset] if options.preset != "article2" else []),
                *(f"{name}-{value}" for name, value in changes.items()),
            ]
        ),
        options.out,
        {
            "environment": found,
            "command": f"train {' '.join(flags)}",
            "epochs": config.epochs,
            "steps": steps,
            "weights": weights,
            "members": members,
            "target": options.target,
            "mean": statistics.fmean(final),
            "results": results,
        },
    )


def reached(run: dict, target: float) -> float | None:
    """Seconds of training until an epoch ended at `target`; None where none did."""
    seconds = 0.0
    for epoch in run["epochs"]:
        seconds += epoch["seconds"]
        if epoch["test"]["accuracy"] >= target:
            return seconds
    return None


if __name__ == "__main__":
    main()
