"""Kill a training with SIGKILL, resume it, and compare it with one that was never interrupted.

    ./run.sh bench kill [--instants=60 --jobs=2]

Every case is a run of its own: a pipeline, an optimizer, and an instant, at random or in the
middle of what the phase names. The run is resumed, in some cases killed again, and at the end its
state, slots and counters included, its metrics and its scalars must be those of the run that
nobody killed, bit for bit; only measured times and memory may differ.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from race import HERE, arguments, describe, environment, save, table

PIPELINES = ("resident", "prefetch", "host")
OPTIMIZERS = ("sgd", "rmsprop", "adam", "adamw", "nadam", "adamax")
PHASES = ("anywhere", "writing a checkpoint", "writing summaries", "evaluation", "a training call")
MOST = {
    "anywhere": 400,
    "writing a checkpoint": 60,
    "writing summaries": 40,
    "evaluation": 6,
    "a training call": 24,
}
SETTINGS = [
    "--preset=digits",
    "--epochs=3",
    "--batch_size=64",
    "--batch_norm",
    "--dropout=0.2",
    "--l2=0.001",
    "--schedule=cosine",
    "--momentum=",
    "--validation_size=100",
    "--steps_per_call=4",
    "--checkpoint_every=7",
    "--keep=2",
    "--quiet",
]
MEASURED = ("speed/", "memory/", "machine/")  # tags whose values are the machine's


class Case(NamedTuple):
    pipeline: str
    optimizer: str
    # (phase, count): at the count-th millisecond, or operation of the phase.
    kills: tuple[tuple[str, int], ...]


def flags(case: Case, folder: Path) -> list[str]:
    return [
        *SETTINGS,
        f"--pipeline={case.pipeline}",
        f"--optimizer={case.optimizer}",
        f"--logdir={folder}",
        "--name=run",
    ]


def child(phase: str, count: int, command: list[str]) -> int:
    """Run tfloop in this process, and kill it inside the count-th operation of the phase."""
    import threading

    from tfloop import cli
    from tfloop.machine import devices

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def deadly(function):
        left = [count]

        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                die()
            return function(*args, **kwargs)

        return wrapped

    started = devices.start

    def start(*arguments):
        found = started(*arguments)
        from tfloop import loop
        from tfloop.inspection import event_files
        from tfloop.training import checkpoints

        if phase == "anywhere":
            run = loop.Loop.pending

            def timed(self, epochs):
                threading.Timer(count / 1000, die).start()
                return run(self, epochs)

            loop.Loop.pending = timed
        elif phase == "writing a checkpoint":  # between any two operations on files
            for name in ("fsync", "open", "rename"):
                setattr(checkpoints.os, name, deadly(getattr(os, name)))
        elif phase == "writing summaries":
            write = event_files.tf.io.TFRecordWriter.write

            def torn(self, record):  # half a record comes to the disk
                write(self, record)
                self.flush()
                if (left := counter.pop()) == 1:
                    path = max(Path(folder).rglob("*tfevents*"), key=lambda p: p.stat().st_mtime_ns)
                    os.truncate(path, path.stat().st_size - len(record) // 2)
                    die()
                counter.append(left - 1)

            counter = [count]
            folder = next(flag for flag in command if flag.startswith("--logdir=")).partition("=")[
                2
            ]
            event_files.tf.io.TFRecordWriter.write = torn
        else:
            at, name = [count], {"evaluation": "evaluation", "a training call": "training"}[phase]
            time_it = loop.Loop._timed

            def timed(self, what):
                if what == name:
                    at[0] -= 1
                    if at[0] == 0:
                        threading.Timer(0.0005, die).start()
                return time_it(self, what)

            loop.Loop._timed = timed
        return found

    devices.start = start
    return cli.main(command)


def train(command: list[str], kill: tuple[str, int] | None = None) -> int:
    """The exit code of a training; minus 9 where it was killed."""
    own = (
        [sys.executable, __file__, "child", *map(str, kill)]
        if kill
        else [sys.executable, "-m", "tfloop"]
    )
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([*own, *command], env=environment, capture_output=True, text=True)
    if done.returncode not in (0, -9):
        raise SystemExit(f"training failed with {done.returncode}: {done.stderr[-2000:]}")
    return done.returncode


def outcome(folder: Path) -> dict:
    """What must be the same: the state's sum, the metrics, the scalars in their order."""
    from tfloop.inspection.event_files import read_scalars

    run = folder / "run-001"
    result = json.loads((run / "result.json").read_text())
    epochs = [
        {key: value for key, value in epoch.items() if key not in ("seconds", "steps")}
        for epoch in result["epochs"]
    ]
    scalars = [
        (s.run, s.tag, s.step, None if s.tag.startswith(MEASURED) else s.value)
        for s in read_scalars(run)
    ]
    return {
        "state": result["state_sha256"],
        "epochs": epochs,
        "best": result["best"]["epoch"],
        "finished": result["finished"],
        "scalars": sorted(scalars, key=lambda s: (s[0], s[1])),
        "order": {
            r: [s[2] for s in scalars if s[0] == r] == sorted(s[2] for s in scalars if s[0] == r)
            for r in {s[0] for s in scalars}
        },
    }


def check(case: Case, expected: dict) -> tuple[Case, int, list[str]]:
    """(case, how often it was really killed, what differs from `expected`)."""
    with tempfile.TemporaryDirectory() as folder:
        command, killed = ["train", *flags(case, Path(folder))], 0
        for kill in (*case.kills, None):
            if (
                train(
                    [*command, "--resume=auto"] if Path(folder, "run-001").is_dir() else command,
                    kill,
                )
                == 0
            ):
                break
            killed += 1
        found = outcome(Path(folder))
    return case, killed, [key for key in expected if found[key] != expected[key]]


def reference(pipeline: str, optimizer: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        train(["train", *flags(Case(pipeline, optimizer, ()), Path(folder))])
        return outcome(Path(folder))


def cases(instants: int, seed: int) -> list[Case]:
    """Each phase in turn, pipelines and optimizers at random; every fifth case is killed three
    times."""
    chance = random.Random(seed)
    found = []
    for index in range(instants):
        phase = PHASES[index % len(PHASES)]
        kills = [(phase, chance.randrange(1, MOST[phase] + 1))]
        if index % 5 == 4:
            kills += [
                (other, chance.randrange(1, MOST[other] // 3 + 1))
                for other in chance.sample(PHASES, 2)
            ]
        found.append(Case(PIPELINES[index // 5 % 3], chance.choice(OPTIMIZERS), tuple(kills)))
    return found


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        sys.exit(child(sys.argv[2], int(sys.argv[3]), sys.argv[4:]))
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--instants", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chosen = cases(options.instants, options.seed)
    with ThreadPoolExecutor(options.jobs) as pool:
        pairs = sorted({(case.pipeline, case.optimizer) for case in chosen})
        expected = dict(zip(pairs, pool.map(lambda pair: reference(*pair), pairs), strict=True))
        results = []
        for case, killed, wrong in pool.map(
            lambda case: check(case, expected[case.pipeline, case.optimizer]), chosen
        ):
            results.append({**case._asdict(), "killed": killed, "differs": wrong})
            print(
                f"{len(results):3} {case.pipeline:9} {case.optimizer:8} killed {killed} of "
                f"{len(case.kills)}: "
                f"{', '.join(f'{phase} at {count}' for phase, count in case.kills)}: "
                f"{'DIFFERS in ' + ', '.join(wrong) if wrong else 'equal'}",
                flush=True,
            )
    found = environment()
    rows = []
    for phase in PHASES:
        mine = [result for result in results if result["kills"][0][0] == phase]
        rows.append(
            [
                phase,
                len(mine),
                sum(result["killed"] for result in mine),
                sum(not result["killed"] for result in mine),
                sum(not result["differs"] for result in mine),
            ]
        )
    print(f"\n{describe(found)}\n")
    print(
        table(
            [
                "first killed in",
                "runs",
                "kills",
                "ended before the kill",
                "equal to the undisturbed run",
            ],
            rows,
        )
    )
    save("kill", options.out, {"environment": found, "cases": results})
    sys.exit(1 if any(result["differs"] for result in results) else 0)


if __name__ == "__main__":
    main()
