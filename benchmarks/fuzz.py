"""Damaged and invented input: every case must end in success or in one clear error.

    ./run.sh bench fuzz [--cases=2000 --only=npz --guided]

Hypothesis makes the cases: valid files with bytes flipped, cut out, repeated and put in, JSON of
any kind, and flags with any value. With --guided Atheris makes those of the file readers: it sees
which lines of the reader a case reaches, and builds on the cases that reach new ones (libFuzzer's
method). What counts as clear is a UserError of one line, which the command line prints and exits
with 2. A checkpoint that was changed must never be taken for a good one.
"""

import argparse
import contextlib
import importlib
import io
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from race import arguments, describe, environment, save, start_quietly, table


class Target(NamedTuple):
    strategy: Any  # Hypothesis's, of cases
    run: Callable  # takes one; raises what it likes
    seed: bytes | None = None  # a valid case, where a case is the content of a file


def targets(folder: Path) -> dict[str, Target]:
    import gzip

    import numpy as np
    import tensorflow as tf
    from hypothesis import strategies as st

    import tfloop
    from tfloop import cli
    from tfloop.commands import command
    from tfloop.config import FIELDS, Config
    from tfloop.data import pack, readers, shards, sources
    from tfloop.errors import UserError
    from tfloop.inspection import event_files
    from tfloop.machine import places
    from tfloop.training import checkpoints

    def mutated(original: bytes):
        """`original` with up to six changes."""
        place = st.integers(0, max(len(original) - 1, 0))
        change = st.tuples(
            st.sampled_from(["set", "cut", "repeat", "insert", "end"]),
            place,
            st.integers(1, 64),
            st.binary(min_size=1, max_size=8),
        )

        def apply(changes):
            found = bytearray(original)
            for kind, at, length, new in changes:
                if kind == "set":
                    found[at : at + len(new)] = new
                elif kind == "cut":
                    del found[at : at + length]
                elif kind == "repeat":
                    found[at:at] = found[at : at + length]
                elif kind == "insert":
                    found[at:at] = new
                else:
                    del found[at:]
            return bytes(found)

        return (
            st.lists(change, min_size=1, max_size=6).map(apply)
            | st.binary(max_size=200)
            | st.just(original)
        )

    def file_target(name: str, original: bytes, read):
        path = folder / name

        def run(content: bytes):
            path.write_bytes(content)
            read(path)

        return Target(mutated(original), run, original)

    images = np.arange(2 * 5 * 4, dtype=np.uint8).reshape(2, 5, 4)
    idx = (
        bytes([0, 0, 8, 3])
        + b"".join(size.to_bytes(4, "big") for size in images.shape)
        + images.tobytes()
    )
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, x_train=images, y_train=np.array([0, 1]), x_test=images, y_test=np.array([1, 0])
    )
    found = {
        "IDX": file_target("f-idx3-ubyte", idx, readers.read_idx),
        "IDX, gzip": file_target("f-idx3-ubyte.gz", gzip.compress(idx), readers.read_idx),
        "npz": file_target("f.npz", buffer.getvalue(), lambda path: sources.load(str(path))),
    }

    text = json.dumps(
        {"l2": 0.1, "conv": [3, 4], "optimizer": "adam", "epochs": 3, "momentum": None}
    ).encode()
    value = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=4,
    )
    settings = st.dictionaries(
        st.sampled_from(sorted(FIELDS)) | st.text(max_size=6), value, max_size=4
    ).map(lambda d: json.dumps(d).encode())
    config = file_target("config.json", text, lambda path: Config.make(**Config.read(path)))
    found["config.json"] = config._replace(strategy=config.strategy | settings)

    word = st.text(alphabet="0123456789.,-eainfNaN:/x ", max_size=6)
    flag = st.tuples(
        st.sampled_from(sorted(command.MODEL)),
        word | st.sampled_from(["3", "2,2", "relu", "same", "digits", "0.5", "mnist"]),
    )

    def flags(chosen):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(
                ["model", "--preset=digits", *(f"--{name}={value}" for name, value in chosen)]
            )
        if code == 2 and (
            err.getvalue().count("\n") != 1 or not err.getvalue().startswith("tfloop: ")
        ):
            raise AssertionError(f"not one clear line: {err.getvalue()!r}")
        if code == 2:
            raise UserError("as it should be")
        if code:
            raise AssertionError(f"exit code {code}")

    found["flags"] = Target(st.lists(flag, min_size=1, max_size=3), flags)

    state = tfloop.make_loop(Config.make("digits", conv=(2,), dense=(3,))).state
    good = checkpoints.Checkpoints(state, folder / "good").save({"note": "good"})
    files = {path.name: path.read_bytes() for path in good.iterdir()}

    def checkpoint(case):
        name, content = case
        copy = folder / "fuzzed" / good.name
        copy.mkdir(parents=True, exist_ok=True)
        for other, original in files.items():
            (copy / other).write_bytes(content if other == name else original)
        try:
            path, _ = checkpoints.newest(copy.parent)
        except UserError:
            raise UserError("as it should be") from None
        if content != files[name] and (
            name != "manifest.json" or json.loads(content) != json.loads(files[name])
        ):
            raise AssertionError(f"a changed {name} was taken for a good one")
        checkpoints.restore(state, path)

    found["checkpoint"] = Target(
        st.one_of([st.tuples(st.just(name), mutated(content)) for name, content in files.items()]),
        checkpoint,
    )

    file = event_files.EventFile(folder / "events")
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb

    for step in range(4):
        file.write(step, scalar_pb("a", float(step)), scalar_pb("b", 1.0))
    file.close()
    written = next((folder / "events").iterdir())
    found["events"] = file_target(
        "events/x.tfevents.1",
        written.read_bytes(),
        lambda path: event_files.read_scalars(path.parent),
    )

    packed = folder / "shards"
    packed.mkdir()
    for part in ("train", "test"):
        with tf.io.TFRecordWriter(str(packed / f"{part}-0.tfrecord")) as writer:
            for label, image in enumerate(images[..., None]):
                writer.write(pack.example(image, label, "png"))
    first = packed / "train-0.tfrecord"
    known = {record for _, _, record, _ in shards._records(first)}

    def read_shards(path: Path) -> None:
        (packed / "index.npz").unlink(missing_ok=True)
        loaded = shards.load(packed).train.inputs
        if not set(loaded.read(np.arange(len(loaded)))[0]) <= known:
            raise AssertionError("a damaged record was taken for a good one")

    found["shards"] = file_target("shards/train-0.tfrecord", first.read_bytes(), read_shards)
    cluster_of_three = {"chief": ["a:1"], "worker": ["b:1", "c:1"]}
    text = json.dumps({"cluster": cluster_of_three, "task": {"type": "worker", "index": 1}})
    found["TF_CONFIG"] = Target(
        mutated(text.encode()).map(lambda content: content.decode(errors="replace")),
        places._from_tf_config,
    )
    return found


def fuzz(name: str, target: Target, cases: int) -> dict:
    """How many cases ended how, and the first that ended in neither success nor a clear error."""
    import hypothesis

    tally = Tally(target.run)

    @hypothesis.settings(
        max_examples=cases,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        derandomize=True,
    )
    @hypothesis.given(target.strategy)
    def check(case):
        tally(case)

    failure = None
    try:
        check()
    except BaseException as error:  # also what is no Exception
        failure = f"{type(error).__name__}: {error}"
    return {"target": name, "maker": "Hypothesis", **tally.result(), "failure": failure}


class Tally:
    """Runs cases and counts how they ended; what is neither success nor a clear error is raised."""

    def __init__(self, run: Callable):
        self._run, self._counts, self._slowest = run, {"success": 0, "clear error": 0}, 0.0

    def __call__(self, case) -> None:
        from tfloop.errors import UserError

        started = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._run(case)
            self._counts["success"] += 1
        except UserError as error:
            if "\n" in str(error):
                raise AssertionError(f"more than one line: {error}") from None
            self._counts["clear error"] += 1
        self._slowest = max(self._slowest, time.perf_counter() - started)

    def result(self) -> dict:
        return {**self._counts, "slowest_s": round(self._slowest, 3)}


READERS = ("IDX", "IDX, gzip", "npz", "config.json", "events", "shards")
INSTRUMENTED = (
    "tfloop.config",
    "tfloop.data.dataset",
    "tfloop.data.readers",
    "tfloop.data.shards",
    "tfloop.data.sources",
    "tfloop.inspection.event_files",
    "tfloop.settings",
    "zipfile",
    "gzip",
)


def fuzz_guided(name: str, cases: int) -> dict:
    """As `fuzz`, in a process of its own, since libFuzzer ends the one it runs in."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, __file__, f"--guide={name}", f"--cases={cases}", f"--folder={folder}"],
            capture_output=True,
            text=True,
        )
        path = Path(folder) / "tally.json"
        found = (
            json.loads(path.read_text())
            if path.exists()
            else {"success": 0, "clear error": 0, "slowest_s": 0.0}
        )
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        new = [line.split() for line in lines if "cov: " in line]
        found["reached"] = int(new[-1][new[-1].index("cov:") + 1]) if new else 0
        return {
            "target": name,
            "maker": "Atheris",
            **found,
            "failure": None if done.returncode == 0 else "\n".join(lines[-15:]),
        }


def guide(name: str, cases: int, folder: Path) -> None:
    """Never returns: libFuzzer ends the process after the last case, or at the first that fails."""
    import atheris

    for module in list(sys.modules):  # all of tfloop, or its classes would be there twice
        if module in INSTRUMENTED or module.split(".")[0] == "tfloop":
            del sys.modules[module]
    with atheris.instrument_imports(include=list(INSTRUMENTED)):
        for module in INSTRUMENTED:
            importlib.import_module(module)
    target = targets(folder)[name]
    tally, left = Tally(target.run), [cases]
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "valid").write_bytes(target.seed)

    def one(content: bytes) -> None:
        left[0] -= 1
        try:
            tally(content)
        finally:
            if left[0] == 0:
                (folder / "tally.json").write_text(json.dumps(tally.result()))

    atheris.Setup(
        [
            sys.argv[0],
            f"-runs={cases}",
            "-seed=1",
            "-max_len=4096",
            "-timeout=20",
            "-rss_limit_mb=8192",
            f"-artifact_prefix={folder}/",
            str(corpus),
        ],
        one,
    )
    atheris.Fuzz()


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--only", default="", help="a part of the target's name")
    parser.add_argument(
        "--guided",
        action="store_true",
        help="the file readers with Atheris, guided by coverage, as well",
    )
    for internal in ("--guide", "--folder"):
        parser.add_argument(internal, default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    start_quietly(shards=1)
    if options.guide:
        guide(options.guide, options.cases, Path(options.folder))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, target in targets(Path(folder)).items():
            if options.only in name:
                rows.append(fuzz(name, target, options.cases))
                print(rows[-1], flush=True)
    for name in READERS if options.guided else ():
        if options.only in name:
            rows.append(fuzz_guided(name, options.cases))
            print(rows[-1], flush=True)
    found = environment()
    print(f"\n{describe(found)}\n")
    print(
        table(
            ["target", "cases by", "success", "clear error", "anything else", "slowest case, s"],
            [
                [
                    row["target"],
                    row["maker"],
                    row["success"],
                    row["clear error"],
                    1 if row["failure"] else 0,
                    row["slowest_s"],
                ]
                for row in rows
            ],
        )
    )
    save("fuzz", options.out, {"environment": found, "results": rows})
    sys.exit(1 if any(row["failure"] for row in rows) else 0)


if __name__ == "__main__":
    main()
