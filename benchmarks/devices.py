"""The same job on the CPU, in several settings, and on every GPU that TensorFlow sees.

They are compared from the event files.

    ./run.sh bench devices [--epochs=1 --repeats=3 --preset=article2]
    ./run.sh bench devices --compare RUN RUN …      # finished runs, from other machines too

Every training is a process of its own, `tfloop train`, and they take turns. Time per step is the
median over the calls of a run, as TensorBoard shows it; set-up, tracing and evaluation are counted
apart.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from race import (
    HERE,
    arguments,
    bars,
    describe,
    environment,
    save,
    start_quietly,
    table,
    with_interval,
)


def settings(gpus: int, cores: int) -> dict[str, list[str]]:
    """label → flags of train."""
    chosen = {f"GPU {i}": [f"--device=gpu:{i}"] for i in range(gpus)}
    chosen |= {f"GPU {i}, TF32": [f"--device=gpu:{i}", "--precision=tf32"] for i in range(gpus)}
    chosen |= {
        f"GPU {i}, {bits}": [f"--device=gpu:{i}", f"--precision={bits}"]
        for i in range(gpus)
        for bits in ("mixed_float16", "mixed_bfloat16")
    }
    chosen |= {f"GPU {i}, XLA": [f"--device=gpu:{i}", "--jit_compile"] for i in range(gpus)}
    chosen |= {
        f"GPU {i}, XLA, a call for each step": [
            f"--device=gpu:{i}",
            "--jit_compile",
            "--steps_per_call=1",
        ]
        for i in range(gpus)
    }
    chosen |= {
        f"GPU {i}, plain forward pass": [f"--device=gpu:{i}", "--nofast"] for i in range(gpus)
    }
    chosen |= {
        f"GPU {i}, host pipeline": [f"--device=gpu:{i}", "--pipeline=host"] for i in range(gpus)
    }
    return chosen | {
        f"CPU, {cores} cores": ["--device=cpu"],
        "CPU, 1 thread": [
            "--device=cpu",
            "--shards=1",
            "--intra_op_threads=1",
            "--inter_op_threads=1",
        ],
        "CPU, plain forward pass": ["--device=cpu", "--nofast"],
        "CPU, host pipeline": ["--device=cpu", "--pipeline=host"],
        "CPU, oneDNN off": ["--device=cpu", "--onednn=off"],
        "CPU, mixed_bfloat16": ["--device=cpu", "--precision=mixed_bfloat16"],
        "CPU, eager": ["--device=cpu", "--eager"],
        "CPU, XLA": ["--device=cpu", "--jit_compile"],
    }


def read(run: Path) -> dict:
    """What a run's event files and result.json say: medians over calls, seconds, accuracy."""
    import tensorflow as tf
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def scalars(part: str, tag: str) -> list[float]:
        events = EventAccumulator(str(run / part), size_guidance={"tensors": 0}).Reload()
        return [float(tf.make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)]

    if not (run / "result.json").is_file():
        raise SystemExit(f"{run.name}: not a finished run: it has no result.json")
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    try:
        ms, accuracy = scalars("train", "speed/ms_per_step"), scalars("test", "accuracy")
    except Exception as error:  # TensorBoard raises of many kinds
        raise SystemExit(f"{run.name}: its event files cannot be read: {error}") from None
    return {
        "ms_per_step": statistics.median(ms),
        "epoch_s": statistics.median(ms) * result["steps_per_epoch"] / 1000,
        "tracing_s": result["seconds"]["tracing"],
        "setup_s": result["seconds"]["setup"],
        "accuracy": accuracy[-1],
        "memory_mib": result["peak_memory_mib"],
        "device": result["device"],
    }


def report(found: dict[str, list[dict]]) -> list[list[str]]:
    """A row for each label, from its repeats."""
    first = statistics.median(run["ms_per_step"] for run in next(iter(found.values())))
    rows = []
    for label, runs in found.items():
        ms, low, high = with_interval([run["ms_per_step"] for run in runs])

        def median(key, runs=runs):
            return statistics.median(run[key] for run in runs)

        rows.append(
            [
                label,
                f"{ms:.2f} ({low:.2f}–{high:.2f})",
                f"{ms / first:.2f}",
                f"{median('epoch_s'):.1f}",
                f"{median('tracing_s'):.1f}",
                f"{median('memory_mib'):.0f}",
                f"{100 * median('accuracy'):.2f} %",
            ]
        )
    return rows


HEADER = [
    "",
    "ms per step (95 %)",
    "÷ first",
    "s per epoch",
    "tracing, s",
    "peak memory, MiB",
    "test accuracy",
]


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument(
        "--compare", nargs="+", metavar="RUN", help="compare finished runs instead of training"
    )
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--preset", default="article2")
    parser.add_argument("--only", default="", help="a part of the settings' names")
    options = parser.parse_args()
    start_quietly()
    if options.compare:
        print(table(HEADER, report({Path(run).name: [read(Path(run))] for run in options.compare})))
        return
    import tensorflow as tf

    found = environment()
    gpus = len(tf.config.list_physical_devices("GPU"))
    if not gpus:
        print("TensorFlow sees no GPU here: CPU settings only.")
    chosen = {
        label: flags
        for label, flags in settings(gpus, found["cores"]).items()
        if options.only in label
    }
    runs: dict[str, list[dict]] = {label: [] for label in chosen}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            for number, (label, flags) in enumerate(chosen.items()):
                command = [
                    sys.executable,
                    "-m",
                    "tfloop",
                    "train",
                    f"--preset={options.preset}",
                    f"--epochs={options.epochs}",
                    f"--logdir={folder}",
                    f"--name=s{number}-{repeat}",
                    "--quiet",
                    *flags,
                ]
                if subprocess.run(command, cwd=HERE.parent).returncode:
                    print(f"left out: {label}: this training failed")
                    continue
                runs[label].append(read(Path(folder) / f"s{number}-{repeat}-001"))
    runs = {label: repeats for label, repeats in runs.items() if repeats}
    if not runs:
        raise SystemExit("no training went through")
    print(
        f"{describe(found)}; {options.preset}, {options.epochs} epochs, {options.repeats} repeats\n"
    )
    print(table(HEADER, report(runs)))
    save(
        "devices",
        options.out,
        {"environment": found, "preset": options.preset, "epochs": options.epochs, "results": runs},
    )
    if options.plot:
        bars(
            Path(options.out) / "devices.png",
            f"One training step of {options.preset} on each device",
            {label: [run["ms_per_step"] for run in repeats] for label, repeats in runs.items()},
            "ms per step (median, 95 %), less is better",
        )


if __name__ == "__main__":
    main()
