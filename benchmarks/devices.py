"""The same job on the CPU, in several settings, and on every GPU that TensorFlow sees.

They are compared from the event files.

    ./run.sh bench devices [--epochs=1 --repeats=3 --preset=article2]
    ./run.sh bench devices --compare RUN RUN …      # finished runs, from other machines too
    ./run.sh bench devices --by_layer [--batches=16,64,256,1024] [--rehearse]

Every training is a process of its own, `tfloop train`, and they take turns. Time per step is the
median over the calls of a run, as TensorBoard shows it; set-up, tracing and evaluation are counted
apart.

By layer, the CPU and the first GPU are compared by `tfloop profile`, at several batch sizes, and it
is said from which one on the GPU pays. With `--rehearse` the plain forward pass on the CPU stands
in for a GPU.
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


def profiled(flags: list[str]) -> dict | None:
    """What `tfloop profile` finds with these flags; None where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "profile.json"
        command = [sys.executable, "-m", "tfloop", "profile", f"--json={file}", *flags]
        found = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
        if found.returncode:
            print(f"left out: {' '.join(flags)}: {found.stderr.strip().splitlines()[-1:]}")
            return None
        return json.loads(file.read_text(encoding="utf-8"))


def by_layer(preset: str, batches: list[int], other: tuple[str, list[str]] | None) -> dict:
    """{device: {batch size: profile}} of the CPU and the other device, with their tables."""
    devices = {"CPU": ["--device=cpu"]} | ({other[0]: other[1]} if other else {})
    found: dict[str, dict[int, dict]] = {}
    for label, flags in devices.items():
        for batch in batches:
            profile = profiled([f"--preset={preset}", f"--batch_size={batch}", *flags])
            if profile:
                found.setdefault(label, {})[batch] = profile
    labels, pays = list(found), None
    for batch in batches:
        profiles = [found[label][batch] for label in labels if batch in found[label]]
        if len(profiles) < len(labels):
            continue
        rows = {row["layer"]: [row] for row in profiles[0]["rows"]}
        for profile in profiles[1:]:
            for row in profile["rows"]:
                rows.setdefault(row["layer"], []).append(row)

        def wall(profile, row):
            """ms of a step that a layer takes of the time that passes."""
            return (row["forward"] + row["backward"] + row["update"]) / profile["lanes"]

        cells = [
            [layer, *(f"{wall(p, r):.3f}" for p, r in zip(profiles, both, strict=True))]
            for layer, both in rows.items()
            if len(both) == len(profiles)
        ]
        cells.append(["a step", *(f"{profile['step']:.3f}" for profile in profiles)])
        if len(profiles) == 2:
            for row in cells:
                first, second = float(row[1]), float(row[2])
                row.append(f"{first / second:.2f}" if second else "")
            if pays is None and profiles[1]["step"] < profiles[0]["step"]:
                pays = batch
        ratio = ["CPU ÷ it"] if len(labels) == 2 else []
        print(f"\nbatch {batch}\n")
        print(table(["ms", *labels, *ratio], cells))
    if len(labels) == 2:
        print(
            f"\n{labels[1]} pays from a batch of {pays} on"
            if pays
            else f"\n{labels[1]} pays at none of these batch sizes"
        )
    return {"profiles": found, "pays_from": pays}


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
    parser.add_argument("--by_layer", action="store_true", help="profiles, layer by layer")
    parser.add_argument("--batches", default="16,64,256,1024", help="with --by_layer")
    parser.add_argument("--rehearse", action="store_true", help="with --by_layer: without a GPU")
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
    if options.by_layer:
        other = ("GPU", ["--device=gpu:0"]) if gpus else None
        if options.rehearse and not gpus:
            other = ("CPU in a GPU's place", ["--device=cpu", "--nofast"])
        batches = [int(size) for size in options.batches.split(",")]
        print(f"{describe(found)}; {options.preset}")
        content = by_layer(options.preset, batches, other)
        save("devices-by-layer", options.out, {"environment": found, **content})
        return
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
