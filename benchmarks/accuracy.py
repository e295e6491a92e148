"""Time to reach a given test accuracy, over several seeds: mean and spread. The accuracy is that of the final epoch."""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from race import HERE, arguments, describe, environment, save, table


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--target", type=float, default=0.99, help="test accuracy to reach")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--preset", default="article2")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "tfloop", "train", f"--preset={options.preset}", f"--epochs={options.epochs}",
                        f"--seeds={options.seeds}", f"--logdir={folder}", "--quiet"], check=True, cwd=HERE.parent)
        runs = [json.loads((path / "result.json").read_text()) for path in sorted(Path(folder).iterdir())]
    final, times, rows = [], [], []
    for run in runs:
        seconds, reached = 0.0, None
        for epoch in run["epochs"]:
            seconds += epoch["seconds"]
            if reached is None and epoch["test"]["accuracy"] >= options.target:
                reached = seconds
        final.append(run["final"]["test"]["accuracy"])
        times.append(reached)
        rows.append([run["config"]["seed"], f"{100 * final[-1]:.2f} %", f"{seconds:.1f}",
                     f"{reached:.1f}" if reached is not None else "not reached"])
    spread = statistics.stdev(final) if len(final) > 1 else 0.0
    found = environment()
    print(f"{describe(found)}; {options.preset}, {options.epochs} epochs\n")
    print(table(["seed", "test accuracy, final epoch", "s of training", f"s until an epoch ended at {100 * options.target:g} %"], rows))
    reached = [t for t in times if t is not None]
    print(f"\nmean {100 * statistics.fmean(final):.2f} %, standard deviation {100 * spread:.2f}; reached by {len(reached)} of "
          f"{len(times)} seeds" + (f", in {statistics.fmean(reached):.1f} s on average" if reached else ""))
    save("accuracy", options.out, {"environment": found, "preset": options.preset, "epochs": options.epochs,
                                   "target": options.target, "final": final, "seconds_to_target": times})


if __name__ == "__main__":
    main()
