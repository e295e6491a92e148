"""Kill with SIGKILL, go on, and compare with what was never interrupted.

    ./run.sh bench kill [--instants=60 --others=40 --clusters=20 --jobs=2]

Every case is a run of its own: a pipeline, an optimizer, and an instant, at random or in the
middle of what the phase names. The run is resumed, in some cases killed again, and at the end its
state, slots and counters included, its metrics and its scalars must be those of the run that
nobody killed, bit for bit; only measured times and memory may differ. Every third lies in a folder
whose name is full of what patterns are made of.

Imports, exports and packs are killed at random instants: what they make is there whole or not at
all, and the next one succeeds and leaves no litter. Of clusters a worker or the launcher is killed
at a random instant, most of them between the workers' meeting and TensorFlow's start: every process
must end in time, and the cluster, started again, must end as one that nobody killed.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
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
    logdir: str = "."  # in the scratch folder


def flags(case: Case, folder: Path) -> list[str]:
    return [
        *SETTINGS,
        f"--pipeline={case.pipeline}",
        f"--optimizer={case.optimizer}",
        f"--logdir={folder / case.logdir}",
        "--name=run",
    ]


ODD = "a [b]*?{c}\\d"


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
        command, killed, logdir = (
            ["train", *flags(case, Path(folder))],
            0,
            folder / Path(case.logdir),
        )
        for kill in (*case.kills, None):
            if (
                train(
                    [*command, "--resume=auto"] if Path(logdir, "run-001").is_dir() else command,
                    kill,
                )
                == 0
            ):
                break
            killed += 1
        found = outcome(logdir)
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
        logdir = ODD if index % 3 == 2 else "."
        pipeline = PIPELINES[index // 5 % 3]
        found.append(Case(pipeline, chance.choice(OPTIMIZERS), tuple(kills), logdir))
    return found


# --- what is made whole or not at all


class Made(NamedTuple):
    """A command that makes something, killed after so many milliseconds."""

    what: str  # of MAKERS
    milliseconds: int


MAKERS = ("import", "export keras", "export saved_model", "export tflite", "export weights", "pack")
LITTER = (".export-*", "*.partial", ".unfinished-*")


def tfloop(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tfloop", *arguments]


def quietly() -> dict:
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "TF_CPP_MIN_LOG_LEVEL": "3"}
    return {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}


SMALL = ("--preset=digits", "--conv=2", "--pool=2", "--dense=4", "--quiet")
_MODEL = """
import sys
import keras
keras.Sequential([
    keras.Input((8, 8, 1)), keras.layers.Conv2D(2, 3, activation="relu"),
    keras.layers.MaxPooling2D(2), keras.layers.Flatten(),
    keras.layers.Dense(4, activation="relu"), keras.layers.Dense(10),
]).save(sys.argv[1])
"""
# Reads what was exported in a process of its own: what is whole can be read.
_READ = {
    "keras": "keras.saving.load_model(path)",
    "saved_model": "tf.saved_model.load(path)",
    "tflite": "tf.lite.Interpreter(path).allocate_tensors()",
    "weights": "h5py.File(path).keys()",
}


def making(what: str, folder: Path) -> tuple[list[str], Path]:
    """(the command, what it makes), once the folder holds what it needs."""
    if what == "import":
        model = folder / "model.keras"
        return tfloop("import", str(model), *SMALL, f"--logdir={folder}/runs"), folder / "runs"
    if what == "pack":
        return tfloop("pack", "digits", f"{folder}/packed"), folder / "packed"
    kind = what.split()[1]
    ending = {"keras": ".keras", "tflite": ".tflite", "weights": ".weights.h5"}.get(kind, "")
    path = folder / f"model{ending}"
    run = str(folder / "runs" / "digits-001")
    return tfloop("export", run, f"--format={kind}", f"--out={path}"), path


def is_whole(what: str, path: Path) -> bool:
    """Can what is there be used?"""
    if what == "import":
        runs = [run for run in path.iterdir() if not run.name.startswith(".")]
        return all(
            subprocess.run(tfloop("evaluate", str(run)), **quietly()).returncode == 0
            for run in runs
        )
    if what == "pack":
        code = "import sys, tfloop; assert len(tfloop.load(sys.argv[1]).train) == 1437"
    else:
        read = _READ[what.split()[1]]
        code = f"import sys, h5py, keras, tensorflow as tf; path = sys.argv[1]; {read}"
    with tempfile.TemporaryDirectory() as plain:  # TensorFlow itself takes names for patterns
        copy = Path(plain) / path.name
        if path.is_dir():
            shutil.copytree(path, copy)
        elif path.exists():
            shutil.copy(path, copy)
        done = subprocess.run([sys.executable, "-c", code, str(copy)], **quietly())
    return done.returncode == 0


def check_made(case: Made, prepared: Path) -> dict:
    """Kill, look at what is there, and make it again."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / ODD
        shutil.copytree(prepared / case.what.split()[0], folder)
        command, path = making(case.what, folder)
        process = subprocess.Popen(command, **quietly())
        time.sleep(case.milliseconds / 1000)
        process.kill()
        killed = process.wait() == -signal.SIGKILL
        wrong = []
        if path.exists() and not is_whole(case.what, path):
            wrong.append("not whole")
        if killed and path.exists() and case.what != "import":  # it was done
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if killed and subprocess.run(command, **quietly()).returncode != 0:
            wrong.append("the next one fails")
        if not is_whole(case.what, path):
            wrong.append("the next one is not whole")
        if litter := [p for pattern in LITTER for p in folder.rglob(pattern)]:
            wrong.append(f"litter: {litter[0].name}")
    return {**case._asdict(), "killed": int(killed), "differs": wrong}


def prepare(folder: Path) -> None:
    """What the makers need, in a folder for each."""
    (folder / "pack").mkdir()
    (folder / "import").mkdir()
    model = str(folder / "import" / "model.keras")
    subprocess.run([sys.executable, "-c", _MODEL, model], check=True, **quietly())
    logdir = f"--logdir={folder}/export/runs"
    subprocess.run(tfloop("train", *SMALL, "--epochs=1", logdir), check=True, **quietly())


def made_cases(count: int, seed: int) -> list[Made]:
    chance = random.Random(seed)
    least, most = 500, {"pack": 3000}  # less than most of them take
    return [
        Made(what, chance.randrange(least, most.get(what, 4000)))
        for what in (MAKERS[index % len(MAKERS)] for index in range(count))
    ]


# --- clusters


class Cluster(NamedTuple):
    """A cluster of two, of which one process is killed."""

    victim: str  # "worker 0", "worker 1", "launcher"
    when: str  # "met", right after the meeting; or after milliseconds


CLUSTER = (*SMALL, "--epochs=20", "--batch_size=96", "--checkpoint_every=20", "--summaries=none")
PATIENCE = 40.0  # seconds in which all must have ended: --worker_timeout=10, and what ends a start

_DEADLY = """
import os, sys
from tfloop.machine import cluster
meet = cluster.meet
def deadly(place, *args):
    found = meet(place, *args)
    if place.index == {index}:
        os.kill(os.getpid(), 9)
    return found
cluster.meet = deadly
"""


def check_cluster(case: Cluster, expected: str) -> dict:
    """Kill, wait for all to end, start again, and compare."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, wrong = Path(scratch), []
        command = tfloop(
            "launch", "--workers=2", *CLUSTER, "--worker_timeout=10", f"--logdir={folder}/runs"
        )
        options = quietly()
        if case.when == "met":
            index = case.victim.split()[-1]
            (folder / "sitecustomize.py").write_text(_DEADLY.format(index=index))
            path = f"{folder}{os.pathsep}{HERE.parent}"
            options["env"] = {**options["env"], "PYTHONPATH": path}
        process = subprocess.Popen(command, **options)
        if case.when != "met":
            time.sleep(int(case.when) / 1000)
        workers = descendants(process.pid)
        if case.when != "met":
            victims = {"launcher": [process.pid], "worker 0": workers[:1], "worker 1": workers[1:2]}
            for pid in victims[case.victim]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + PATIENCE
        everyone: set[int] = {process.pid, *workers}
        while any(is_alive(pid) for pid in everyone) and time.monotonic() < until:
            process.poll()
            everyone |= set(descendants(process.pid))
            time.sleep(0.05)
        if left := [pid for pid in everyone if is_alive(pid)]:
            wrong.append(f"{len(left)} processes live on")
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        seconds = round(PATIENCE - (until - time.monotonic()), 1)
        _, error = process.communicate()
        if b"Traceback" in error:
            wrong.append("a traceback")
        again = subprocess.run([*command, "--resume=auto"], **quietly())
        found = "" if again.returncode else state_of(folder / "runs")
        if found != expected:
            wrong.append(f"the next one ends with {again.returncode} and another state")
    return {**case._asdict(), "killed": 1, "seconds": seconds, "differs": wrong}


def state_of(logdir: Path) -> str:
    return json.loads((logdir / "digits-001" / "result.json").read_text())["state_sha256"]


def descendants(pid: int) -> list[int]:
    """The children of a process, then theirs."""
    out = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout
    pairs = [tuple(map(int, line.split())) for line in out.splitlines()]
    found = [pid]
    for _ in range(2):
        found += [child for child, parent in pairs if parent in found and child not in found]
    return found[1:]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def cluster_cases(count: int, seed: int) -> list[Cluster]:
    chance, found = random.Random(seed), []
    for index in range(count):
        if index % 2:
            found.append(Cluster(f"worker {index // 2 % 2}", "met"))
        else:
            victim = ("launcher", "worker 0", "worker 1")[index // 2 % 3]
            found.append(Cluster(victim, str(chance.randrange(300, 6000))))
    return found


def undisturbed_cluster() -> str:
    with tempfile.TemporaryDirectory() as folder:
        command = tfloop("launch", "--workers=2", *CLUSTER, f"--logdir={folder}")
        subprocess.run(command, check=True, **quietly())
        return state_of(Path(folder))


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        sys.exit(child(sys.argv[2], int(sys.argv[3]), sys.argv[4:]))
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--instants", type=int, default=60)
    parser.add_argument("--others", type=int, default=36, help="imports, exports and packs")
    parser.add_argument("--clusters", type=int, default=20)
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
    others = kill_others(options.others, options.seed, options.jobs)
    clusters = []
    if options.clusters:
        expected_state = undisturbed_cluster()
        for cluster in cluster_cases(options.clusters, options.seed):
            clusters.append(check_cluster(cluster, expected_state))
            print(clusters[-1], flush=True)
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
    print()
    print(
        table(
            ["killed", "times", "ended before the kill", "right afterwards"],
            [
                [
                    what,
                    sum(case["killed"] for case in mine),
                    sum(not case["killed"] for case in mine),
                    sum(not case["differs"] for case in mine),
                ]
                for what, mine in (
                    *((w, [case for case in others if case["what"] == w]) for w in MAKERS),
                    ("cluster, as it met", [c for c in clusters if c["when"] == "met"]),
                    ("cluster, anywhere", [c for c in clusters if c["when"] != "met"]),
                )
            ],
        )
    )
    every = [*results, *others, *clusters]
    tally = {"cases": results, "others": others, "clusters": clusters}
    save("kill", options.out, {"environment": found, **tally})
    sys.exit(1 if any(result["differs"] for result in every) else 0)


def kill_others(count: int, seed: int, jobs: int) -> list[dict]:
    if not count:
        return []
    found = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        prepare(Path(folder))
        for case in pool.map(lambda case: check_made(case, Path(folder)), made_cases(count, seed)):
            found.append(case)
            print(case, flush=True)
    return found


if __name__ == "__main__":
    main()
