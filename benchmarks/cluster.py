"""Several replicas and workers on this machine: do they train the same, what does it cost, and what
happens when one fails?

    ./run.sh bench cluster [--rounds=1 --skip=failures]

1. 300 steps on MNIST with 1, 2 and 4 replicas in one process, and with 1, 2 and 4 processes over
   gRPC on 127.0.0.1, against the run on one device: the largest relative difference of the loss,
   and the time of a step. Once with a smooth network, where rounding stays small, and once with
   the default one, whose ReLUs and max-pools make training chaotic: there the yardstick is the
   same run with one weight changed by one unit in its last place.
2. A model of the cost, step time = computing + adding up, with what is measured here put in,
   against the measured time; and what it says for other links.
3. Workers that are killed or do not fit: what each of the others prints, and after how many
   seconds.
"""

import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tfloop.wording import counted

from race import HERE, arguments, describe, environment, save, table

SMOOTH = [
    "--conv_activation=tanh",
    "--dense_activation=tanh",
    "--optimizer=sgd",
    "--learning_rate=0.01",
]
WAYS = {
    "one device": ["train"],
    **{
        f"{counted(n, 'replica')}, one process": [
            "train",
            "--strategy=mirrored",
            f"--replicas={n}",
        ]
        for n in (1, 2, 4)
    },
    **{f"{n} process{'es' * (n > 1)}": ["launch", f"--workers={n}"] for n in (1, 2, 4)},
}
STEPS, BATCH = 300, 64


def command(*flags: str, **environment_) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tfloop", *flags],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), **environment_},
    )


def run(*flags: str) -> tuple[list[float], float]:
    """(the loss of each call of 50 steps up to STEPS, ms per step) of one epoch of MNIST."""
    from tfloop.inspection.event_files import read_scalars

    with tempfile.TemporaryDirectory() as folder:
        process = command(
            *flags,
            "--epochs=1",
            "--steps_per_call=50",
            "--summaries=scalars",
            "--quiet",
            f"--logdir={folder}",
        )
        _, error = process.communicate(timeout=600)
        if process.returncode:
            raise SystemExit(f"{' '.join(flags)}: {error.strip()}")
        found = next(Path(folder).iterdir())
        losses = [
            scalar.value
            for scalar in read_scalars(found)
            if scalar.run == "train" and scalar.tag == "loss/total"
        ]
        return losses[: STEPS // 50], json.loads((found / "result.json").read_text())["ms_per_step"]


def one_ulp_off() -> list[float]:
    """The losses of the default job where one weight is changed by one unit in the last place."""
    code = """
import json, sys
import numpy as np
from tfloop import config
from tfloop.machine import devices
settings, *_ = devices.start(config.Config.make(shards=1, steps_per_call=50))
from tfloop import assembly
from tfloop.training import saved_run
from tfloop.records import Call
loop = assembly.make_loop(settings)
kernel = loop.state.weights["conv1/kernel"]
value = kernel.numpy()
value.flat[0] = np.nextafter(value.flat[0], np.float32(9))
kernel.assign(value)
print(json.dumps([record.train.total for record in loop.run(1) if isinstance(record, Call)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
    )
    return json.loads(done.stdout)[: STEPS // 50]


def difference(losses: list[float], reference: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(one - other) / other for one, other in zip(losses, reference, strict=True))


def compare(rounds: int) -> list[dict]:
    rows = []
    for job, flags in (("smooth", SMOOTH), ("default", [])):
        reference = None
        for way, how in WAYS.items():
            turns = [
                run(*how, *flags, *["--shards=1"] * (how[0] == "train")) for _ in range(rounds)
            ]
            reference = reference or turns[0][0]
            rows.append(
                {
                    "job": job,
                    "way": way,
                    "difference": difference(turns[0][0], reference),
                    "ms_per_step": statistics.median(ms for _, ms in turns),
                }
            )
            print(rows[-1], flush=True)
        if job == "default":
            rows.append(
                {
                    "job": job,
                    "way": "one device, one weight changed in its last bit",
                    "difference": difference(one_ulp_off(), reference),
                }
            )
    return rows


# --- the cost


def predict(compute_ms: float, workers: int, size: int, link: dict) -> float:
    """ms of a step: computing a share of the batch, and a ring all-reduce of `size` bytes.

    Each worker sends and receives 2 · (W - 1) messages of size / W bytes: 2 · (W - 1) · (latency +
    size / W / bandwidth). (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009.)
    """
    return compute_ms + 2 * (workers - 1) * (
        1000 * link["latency_s"] + 1000 * size / workers / link["bytes_per_s"]
    )


ADD_UP = """
import json, sys, time
import numpy as np
from tfloop import config
from tfloop.machine import devices
threads = dict(intra_op_threads=1, inter_op_threads=1)
settings = config.Config.make(strategy="multi_worker", batch_size=64, shards=1, **threads)
_, _, replicas = devices.start(settings)
import tensorflow as tf

def repeat(size, times):
    vector = tf.random.normal([size])
    def body(i, x):
        return i + 1, replicas._sum(lambda: tf.identity(x)) * 0.5
    def all_turns():
        return tf.while_loop(lambda i, _: i < times, body, (0, vector))[1]
    loop = tf.function(all_turns, autograph=False)
    loop()
    started = time.perf_counter()
    loop().numpy()
    return (time.perf_counter() - started) / times

found = {size: repeat(size, 200) for size in map(int, sys.argv[1].split(","))}
if replicas.is_chief:
    print(json.dumps(found))
"""


def workers(count: int) -> list[dict]:
    """The environment of each of N workers, on free ports."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]
    for listener in listeners:
        listener.close()
    return [
        {
            "TF_CONFIG": json.dumps(
                {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            )
        }
        for index in range(count)
    ]


def adding_up(count: int, sizes: list[int]) -> dict[int, float]:
    """Seconds to add up a float32 vector over N workers, by its size."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ADD_UP, ",".join(map(str, sizes))],
            text=True,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": str(HERE.parent),
                "TF_CPP_MIN_LOG_LEVEL": "3",
                **place,
            },
        )
        for place in workers(count)
    ]
    out = [process.communicate(timeout=300)[0] for process in processes]
    return {int(size): seconds for size, seconds in json.loads(out[0].splitlines()[-1]).items()}


LINKS = {
    "10 Gbit/s Ethernet": {"bytes_per_s": 1.25e9, "latency_s": 30e-6},
    "100 Gbit/s Ethernet": {"bytes_per_s": 12.5e9, "latency_s": 15e-6},
    "400 Gbit/s InfiniBand": {"bytes_per_s": 50e9, "latency_s": 3e-6},
    "NVLink, 300 GB/s": {"bytes_per_s": 300e9, "latency_s": 3e-6},
}


def cost(rows: list[dict], cores: int) -> dict:
    """Computing and adding up, each measured on its own; their sum against the measured steps; and
    other links."""
    weights = 96_844
    compute = {
        count: run(
            "train",
            *SMOOTH,
            f"--batch_size={BATCH // count}",
            f"--shards={max(1, cores // count)}",
            "--intra_op_threads=1",
            f"--inter_op_threads={max(1, cores // count)}",
        )[1]
        for count in (1, 2, 4)
    }
    sizes, checked = [weights + 9, 9], []
    for count in (1, 2, 4):
        seconds = adding_up(count, sizes) if count > 1 else dict.fromkeys(sizes, 0.0)
        crowding = max(1.0, count / cores)  # workers that share a core wait for each other
        predicted = crowding * compute[count] + 1000 * seconds[sizes[0]]
        measured = next(
            row["ms_per_step"]
            for row in rows
            if row["job"] == "smooth" and row["way"].startswith(f"{count} process")
        )
        checked.append(
            {
                "workers": count,
                "compute_ms": compute[count],
                "crowding": crowding,
                "adding_up_ms": 1000 * seconds[sizes[0]],
                "latency_ms": 1000 * seconds[sizes[1]],
                "predicted_ms": predicted,
                "measured_ms": measured,
            }
        )
        print(checked[-1], flush=True)
    size = 4 * (weights + 9)
    other = [
        {
            "link": name,
            "workers": count,
            "adding_up_ms": predict(0.0, count, size, link),
            "compute_ms_for_90_percent": 9 * predict(0.0, count, size, link),
        }
        for name, link in LINKS.items()
        for count in (8, 64)
    ]
    return {"bytes_per_step": size, "checked": checked, "other_links": other}


# --- failures


def failures() -> list[dict]:
    """What each worker prints, and how long it takes to, where one of three fails."""
    found = []

    def note(
        what: str, processes: list[subprocess.Popen], started: float, names: list[str]
    ) -> None:
        for name, process in zip(names, processes, strict=True):
            _, error = process.communicate(timeout=120)
            lines = [
                re.sub(r"(127\.0\.0\.1):\d+", r"\1:PORT", line)
                for line in error.strip().splitlines()
            ]
            found.append(
                {
                    "what": what,
                    "worker": name,
                    "code": process.returncode,
                    "seconds": round(time.monotonic() - started, 1),
                    "prints": lines,
                }
            )
            print(found[-1], flush=True)

    for victim in (0, 1):
        with tempfile.TemporaryDirectory() as folder:
            processes = [
                command(
                    "train",
                    "--strategy=multi_worker",
                    "--batch_size=60",
                    "--shards=1",
                    "--quiet",
                    f"--logdir={folder}",
                    **place,
                )
                for place in workers(3)
            ]
            time.sleep(20)
            started = time.monotonic()
            processes[victim].kill()
            note(f"worker {victim} is killed while it trains", processes, started, ["0", "1", "2"])
    for what, flags in (
        ("worker 2 never comes", [[], []]),
        ("worker 2 has another --l2", [[], [], ["--l2=0.1"]]),
        ("worker 0, the chief, never comes", [None, [], []]),
    ):
        with tempfile.TemporaryDirectory() as folder:
            started, places = time.monotonic(), workers(3)
            own = [(index, flag) for index, flag in enumerate(flags) if flag is not None]
            processes = [
                command(
                    "train",
                    "--strategy=multi_worker",
                    "--batch_size=60",
                    "--worker_timeout=10",
                    f"--logdir={folder}",
                    *flag,
                    **places[index],
                )
                for index, flag in own
            ]
            note(what, processes, started, [str(index) for index, _ in own])
    with tempfile.TemporaryDirectory() as folder:
        started, places = time.monotonic(), workers(2)
        port = int(json.loads(places[1]["TF_CONFIG"])["cluster"]["worker"][1].split(":")[1])
        with socket.create_server(("127.0.0.1", port)):
            processes = [
                command("train", "--strategy=multi_worker", f"--logdir={folder}", **place)
                for place in places
            ]
            note(
                "the port of worker 1 is taken, say by a second worker 1",
                processes,
                started,
                ["0", "1"],
            )
    return found


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--skip", default="", choices=("", "failures"))
    parser.set_defaults(rounds=1)
    options = parser.parse_args()
    about = environment()
    rows = compare(options.rounds)
    model = cost(rows, about["cores"])
    failed = [] if options.skip else failures()
    print(f"\n{describe(about)}\n")
    print(
        table(
            ["", "smooth: difference", "ms/step", "default: difference", "ms/step"],
            [
                [
                    way,
                    *(
                        text
                        for job in ("smooth", "default")
                        for row in [
                            next((r for r in rows if (r["job"], r["way"]) == (job, way)), {})
                        ]
                        for text in (
                            f"{row['difference']:.1e}" if row else "",
                            f"{row['ms_per_step']:.2f}" if "ms_per_step" in row else "",
                        )
                    ),
                ]
                for way in dict.fromkeys(row["way"] for row in rows)
            ],
        )
    )
    print()
    print(
        table(
            [
                "workers",
                "computing its share, ms",
                "× workers to a core",
                "adding up, ms",
                "predicted",
                "measured",
            ],
            [
                [
                    row["workers"],
                    f"{row['compute_ms']:.2f}",
                    f"{row['crowding']:g}",
                    f"{row['adding_up_ms']:.2f}",
                    f"{row['predicted_ms']:.2f}",
                    f"{row['measured_ms']:.2f}",
                ]
                for row in model["checked"]
            ],
        )
    )
    print()
    print(
        table(
            [
                "link (assumed)",
                "workers",
                f"adding up {model['bytes_per_step'] / 1000:.0f} kB, ms",
                "computing must take, for 90 % of ideal",
            ],
            [
                [
                    row["link"],
                    row["workers"],
                    f"{row['adding_up_ms']:.3f}",
                    f"{row['compute_ms_for_90_percent']:.2f} ms",
                ]
                for row in model["other_links"]
            ],
        )
    )
    print()
    print(
        table(
            ["what happens", "worker", "exit code", "after, s", "it prints"],
            [
                [row["what"], row["worker"], row["code"], row["seconds"], " ".join(row["prints"])]
                for row in failed
            ],
        )
    )
    save(
        "cluster",
        options.out,
        {"environment": about, "replicas": rows, "cost": model, "failures": failed},
    )


if __name__ == "__main__":
    main()
