"""A long run with summaries and checkpoints: do memory and open files stay flat?

    ./run.sh bench stability [--steps=20000]

Trains the digits with a small network, a checkpoint every 100 steps and --summaries=full after
every epoch, and notes the memory in use and the number of open files after every epoch.
"""

import os
import tempfile
from pathlib import Path

from race import arguments, describe, environment, save, start_quietly, table

WARM_UP = 0.1  # share of the run that is not judged


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument(
        "--summaries", default="full", choices=("none", "scalars", "default", "full")
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = start_quietly(
            preset="digits",
            summaries=options.summaries,
            checkpoint_every="100",
            logdir=folder,
            quiet=True,
            epochs=1,
        )
        from tfloop.training import session

        notes = []

        def note() -> bool:
            """Asked after every record; never a reason to stop."""
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            notes.append(
                (pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd")))
            )
            return False

        epochs = -(-options.steps // 45)
        result = session.train(config.replace(epochs=epochs), stop=note)[0]
    judged = notes[int(WARM_UP * len(notes)) :]
    quarter = len(judged) // 4
    first, last = judged[:quarter], judged[-quarter:]

    def mean(rows, column):
        return sum(row[column] for row in rows) / len(rows)

    growth = 1000 * (mean(last, 0) - mean(first, 0)) / (0.75 * (1 - WARM_UP) * result["steps"])
    found = environment()
    print(describe(found) + "\n")
    print(
        table(
            ["", "first quarter after warm-up", "last quarter", "most"],
            [
                [
                    "memory, MiB",
                    f"{mean(first, 0):.1f}",
                    f"{mean(last, 0):.1f}",
                    f"{max(row[0] for row in judged):.1f}",
                ],
                [
                    "open files",
                    f"{mean(first, 1):.1f}",
                    f"{mean(last, 1):.1f}",
                    f"{max(row[1] for row in judged)}",
                ],
            ],
        )
    )
    print(
        f"\n{result['steps']} steps, {len(result['epochs'])} epochs; memory grew by "
        f"{growth:.2f} MiB per 1000 steps"
    )
    save(
        "stability",
        options.out,
        {
            "environment": found,
            "steps": result["steps"],
            "summaries": options.summaries,
            "memory_mib": [round(m, 1) for m, _ in notes],
            "open_files": [f for _, f in notes],
        },
    )


if __name__ == "__main__":
    main()
