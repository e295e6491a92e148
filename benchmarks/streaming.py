"""Memory over time while images are streamed that would not fit.

    ./run.sh bench streaming [--gib=4 --limit_mib=512]

Generates shards of random raw images, --gib of them, sets itself a limit of --limit_mib on top of
the memory in use once training has begun (RLIMIT_DATA: the system refuses more), trains an epoch,
and notes the memory in use after every call.
"""

import os
import resource
import tempfile
import time
from pathlib import Path

from race import arguments, describe, environment, save, start_quietly, table

SIDE = 96


def generate(folder: Path, gib: float) -> None:
    import numpy as np
    import tensorflow as tf

    from tfloop.data import pack

    images = np.random.default_rng(0).integers(0, 256, (256, SIDE, SIDE, 3), dtype=np.uint8)
    examples = [pack.example(image, row % 10, "raw") for row, image in enumerate(images)]
    count = int(gib * 2**30 / images[0].nbytes)
    for shard in range(16):
        with tf.io.TFRecordWriter(str(folder / f"train-{shard:05d}-of-00016.tfrecord")) as writer:
            for row in range(shard, count, 16):
                writer.write(examples[row % 256])
    with tf.io.TFRecordWriter(str(folder / "test-00000-of-00001.tfrecord")) as writer:
        for row in range(256):
            writer.write(examples[row])


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--limit_mib", type=int, default=512)
    options = parser.parse_args()

    def memory():
        return (
            int(Path("/proc/self/statm").read_text().split()[1])
            * os.sysconf("SC_PAGE_SIZE")
            / 2**20
        )

    with tempfile.TemporaryDirectory() as folder:
        config = start_quietly(
            dataset=folder, conv=(4,), pool=(8,), dense=(8,), batch_size=64, steps_per_call=20
        )
        generate(Path(folder), options.gib)
        from tfloop import assembly
        from tfloop.records import Call

        started = time.perf_counter()
        loop = assembly.make_loop(config)
        indexed = time.perf_counter() - started
        loop.evaluate(loop.data.test)
        records, notes = loop.run(1), []
        for _ in range(3):
            next(records)
        before = memory()
        status = Path("/proc/self/status").read_text(encoding="ascii")
        used = int(status.partition("VmData:")[2].split()[0]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (used + (options.limit_mib << 20),) * 2)
        started, waited, steps = time.perf_counter(), 0.0, 0
        for record in records:
            if isinstance(record, Call):
                notes.append((time.perf_counter() - started, memory()))
                waited, steps = waited + record.input_seconds, steps + record.steps
        seconds = notes[-1][0]
    found = environment()
    read = steps * 64 * SIDE * SIDE * 3 / 2**20
    quarter = max(1, len(notes) // 4)

    def mean(rows):
        return sum(row[1] for row in rows) / len(rows)

    print(describe(found) + "\n")
    print(
        table(
            [
                "images on disk, MiB",
                "limit above what was in use, MiB",
                "memory at the start, MiB",
                "first quarter",
                "last quarter",
                "most",
                "read, MiB/s",
                "waiting for input",
            ],
            [
                [
                    f"{loop.data.train.inputs.nbytes / 2**20:.0f}",
                    options.limit_mib,
                    f"{before:.0f}",
                    f"{mean(notes[:quarter]):.0f}",
                    f"{mean(notes[-quarter:]):.0f}",
                    f"{max(row[1] for row in notes):.0f}",
                    f"{read / seconds:.0f}",
                    f"{100 * waited / seconds:.0f} %",
                ]
            ],
        )
    )
    print(f"\nindexed in {indexed:.1f} s, once; {steps} steps in {seconds:.1f} s")
    save(
        "streaming",
        options.out,
        {
            "environment": found,
            "images_mib": loop.data.train.inputs.nbytes / 2**20,
            "limit_mib": options.limit_mib,
            "memory_at_start_mib": before,
            "seconds_and_memory_mib": [[round(a, 2), round(b, 1)] for a, b in notes],
            "indexed_s": indexed,
            "waited_s": waited,
            "steps": steps,
        },
    )
    if options.plot:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
        axes.plot(*zip(*notes, strict=True), label="memory in use")
        axes.axhline(before + options.limit_mib, color="tab:red", linestyle="--", label="limit")
        axes.axhline(
            loop.data.train.inputs.nbytes / 2**20,
            color="tab:gray",
            linestyle=":",
            label="the images",
        )
        axes.set(
            xlabel="seconds", ylabel="MiB", ylim=(0, None), title="An epoch streamed from disk"
        )
        axes.legend()
        figure.savefig(Path(options.out) / "streaming.png", dpi=110)


if __name__ == "__main__":
    main()
