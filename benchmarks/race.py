"""Contenders take turns: A B C, A B C, …, so that a machine whose speed drifts does so for all of
them."""

import contextlib
import json
import math
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PAUSE = 0.3  # seconds; OpenMP's threads wait busily for 0.2 s
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # so that each benchmark also runs as a plain script


# What TensorFlow, abseil and XLA write to stderr beside what ends a process.
LOG_LINE = re.compile(
    r"[IWEF]\d{4} |WARNING: All log messages|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d|To enable the following"
)
# Settings that say how a job is done, not what it is.
HOW = (
    "cores",
    "eager",
    "ensemble",
    "fast",
    "inter_op_threads",
    "intra_op_threads",
    "jit_compile",
    "onednn",
    "pipeline",
    "shards",
    "steps_per_call",
)
_jobs: dict[str, tempfile.TemporaryDirectory] = {}


def job_folder(settings: dict) -> str:
    """The folder with the files of a job, made once."""
    key = json.dumps({k: v for k, v in settings.items() if k not in HOW}, sort_keys=True)
    if key not in _jobs:
        folder = tempfile.TemporaryDirectory(prefix="tfloop-job-")
        command = [sys.executable, str(HERE / "jobs.py"), folder.name, key]
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        made = subprocess.run(command, capture_output=True, text=True, env=environment)
        if made.returncode:
            last = made.stderr.strip().splitlines()[-1:]
            raise SystemExit(f"the job's files could not be made: {' '.join(last)}")
        _jobs[key] = folder
    own = Path(tempfile.mkdtemp(dir=_jobs[key].name))
    for file in Path(_jobs[key].name).glob("*.np*"):
        (own / file.name).symlink_to(file)
    known = json.loads((Path(_jobs[key].name) / "job.json").read_text())
    (own / "job.json").write_text(json.dumps({**known, "settings": settings}))
    return str(own)


def _on_cores(count: int | None) -> list[str]:
    """What to put before a command so that it has so many cores."""
    if not count:
        return []
    cores = sorted(os.sched_getaffinity(0))[:count]
    return ["taskset", "-c", ",".join(map(str, cores))]


class Contender:
    """A process that trains when told to. `name` is one of contenders.CONTENDERS; `label` is what
    tables call it."""

    def __init__(self, name: str, settings: dict, label: str = ""):
        self.name, self.label, self.settings = name, label or name, settings
        self.turns, self.memory = [], 0.0
        paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        # All live at once.
        environment = {
            **os.environ,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "PYTHONPATH": os.pathsep.join(paths),
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        environment.pop("TF_ENABLE_ONEDNN_OPTS", None)
        command = [sys.executable, str(HERE / "contenders.py"), name, job_folder(settings)]
        # A pipe that nobody reads fills up.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*_on_cores(settings.get("cores")), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        ready = self._answer()
        self.missing, self.loss = ready.get("missing"), ready.get("loss")
        self.least, self.imported = ready.get("least", 1), ready.get("imported", [])

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.label}: {self._end()}")
        return json.loads(line)

    def _end(self) -> str:
        """How the process ended: its signal or exit code, and the last line that is its own."""
        code = self._process.wait(timeout=60)
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        own = [line for line in lines if not LOG_LINE.match(line)]
        how = f"exit code {code}"
        if code < 0:
            how = f"ended by {signal.Signals(-code).name}"
        return f"{how}; its last line: {own[-1] if own else 'none'}"

    def run(self, steps: int) -> float:
        """Seconds that `steps` steps take."""
        with contextlib.suppress(BrokenPipeError):  # what it died of, `_answer` says
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        answer = self._answer()
        self.memory = answer["memory_mib"]
        return answer["seconds"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)


def race(contenders: list[Contender], seconds: float, rounds: int, most: int = 900) -> None:
    """Warm every contender up, choose its steps for a turn of about `seconds`, and let them take
    turns.

    Every turn begins with a pause, in which the threads of the one before come to rest, and a few
    steps that do not count. After it, `turns` of each contender holds its milliseconds per step,
    round by round.
    """
    steps = {}
    for contender in contenders:
        contender.run(contender.least)
        guess = contender.run(2 * contender.least) / (2 * contender.least)
        count = min(most, max(1, round(seconds / guess / contender.least)) * contender.least)
        steps[contender] = max(count, contender.least)
        contender.run(steps[contender])
    for _ in range(rounds):
        for contender in contenders:
            time.sleep(PAUSE)
            contender.run(contender.least)
            contender.turns.append(1000 * contender.run(steps[contender]) / steps[contender])


def ratios(slower: Contender, faster: Contender) -> tuple[float, float, float]:
    """(median, low, high) of slower / faster, pair by pair; low and high bound a 95 % bootstrap
    interval of the median."""
    return with_interval([a / b for a, b in zip(slower.turns, faster.turns, strict=True)])


def with_interval(values: list[float], samples: int = 2000) -> tuple[float, float, float]:
    """(median, low, high): the 95 % percentile interval of the median over bootstrap samples."""
    chance = random.Random(0)
    medians = sorted(
        statistics.median(chance.choices(values, k=len(values))) for _ in range(samples)
    )
    return (
        statistics.median(values),
        medians[int(0.025 * samples)],
        medians[int(0.975 * samples) - 1],
    )


def exponent(sizes: list[float], costs: list[float]) -> float:
    """The b of cost = a · size^b, by least squares on the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    mx, my = statistics.fmean(x), statistics.fmean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum(
        (a - mx) ** 2 for a in x
    )


def environment() -> dict:
    """What the figures depend on. No host name and no path."""
    from importlib.metadata import PackageNotFoundError, version

    from tfloop.machine.devices import cores

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        info = dict(
            line.split(":", 1)
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if ":" in line
        )
        info = {key.strip(): value.strip() for key, value in info.items()}
        model = info.get("model name", model)
        if "avx512f" in info.get("flags", ""):
            model += ", AVX-512"
    commit = (
        subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True
        ).stdout.strip()
        if _has("git")
        else ""
    )
    gpus = (
        subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        if _has("nvidia-smi")
        else []
    )
    import datetime

    return {
        "date": datetime.date.today().isoformat(),
        "cpu": model,
        "cores": cores(),
        "gpus": gpus,
        "python": platform.python_version(),
        "commit": commit,
        "packages": {
            name: found
            for name in ("tensorflow", "keras", "numpy", "torch", "jax")
            if (found := installed(name))
        },
    }


def start_quietly(**settings):
    """Import TensorFlow without its start-up messages; the settings that tfloop chose for this
    machine."""
    from tfloop.config import Config
    from tfloop.machine.devices import start

    return start(Config.make(**settings))[0]


def _has(program: str) -> bool:
    import shutil

    return shutil.which(program) is not None


def describe(found: dict) -> str:
    """The environment in one line."""
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    return f"{found['date']}, {machine(found)}; {packages}"


def machine(found: dict) -> str:
    """The environment's part that stays the same from day to day."""
    return f"{found['cores']} cores of {found['cpu']}, {', '.join(found['gpus']) or 'no GPU'}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def save(name: str, out: str, content: dict) -> None:
    """Write `out`/name.json and say where."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {os.path.relpath(folder / f'{name}.json')}")


def arguments(description: str, rounds: int = 7, seconds: float = 1.5):
    """The flags that every benchmark has."""
    import argparse

    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each contender")
    parser.add_argument("--seconds", type=float, default=seconds, help="length of a turn, about")
    parser.add_argument(
        "--out", default=str(HERE / "results"), help="folder for the JSON and the plot"
    )
    parser.add_argument("--plot", action="store_true", help="also write a PNG")
    return parser


def bars(
    path: Path,
    title: str,
    measured: dict[str, list[float]],
    unit: str,
    lines: dict[str, float] | None = None,
) -> None:
    """A bar for each label, as long as the median of what was measured, with its 95 % interval, the
    first one in colour;
    `lines` go across."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 0.42 * len(measured) + 1.3), layout="constrained")
    axes = figure.add_subplot()
    medians, lows, highs = zip(*map(with_interval, measured.values()), strict=True)
    reach = [
        [m - low for m, low in zip(medians, lows, strict=True)],
        [high - m for m, high in zip(medians, highs, strict=True)],
    ]
    axes.barh(
        range(len(measured)),
        medians,
        color=["#1f5fa8"] + ["#b9c4d0"] * (len(measured) - 1),
        xerr=reach,
        ecolor="#505860",
        capsize=3,
    )
    axes.set_yticks(range(len(measured)), measured)
    axes.invert_yaxis()
    for i, (median, high) in enumerate(zip(medians, highs, strict=True)):
        axes.text(high, i, f" {median:.2f}", va="center")
    for label, value in (lines or {}).items():
        axes.axvline(value, color="#c05020", linestyle="--", linewidth=1)
        axes.text(value, len(measured) - 0.45, f" {label} {value:.2f}", color="#c05020", va="top")
    axes.set(title=title, xlabel=unit, xlim=(0, 1.12 * max(highs)))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    print(f"written: {os.path.relpath(path)}")
