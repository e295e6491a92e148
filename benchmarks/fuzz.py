"""Damaged and invented input: every case must end in success or in one clear error.

    ./run.sh bench fuzz [--cases=2000 --only=npz --guided]

Hypothesis makes the cases: valid files with bytes flipped, cut out, repeated and put in, JSON of
any kind, and flags with any value. With --guided Atheris makes those of the file readers: it sees
which lines of the reader a case reaches, and builds on the cases that reach new ones (libFuzzer's
method). What counts as clear is a UserError of one line, which the command line prints and exits
with 2. A checkpoint that was changed must never be taken for a good one. Memory is limited.
"""

import argparse
import contextlib
import importlib
import io
import json
import resource
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
    from tfloop.data import pack, readers, shards, sources, tfrecords
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
    known = {record for _, _, record, _ in tfrecords.records(first)}

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
    found |= pictures_target(folder, mutated)
    found |= run_targets(folder, mutated)
    return found


def edited(document):
    """Strategy: the JSON document with one to three of its values, at any depth, replaced."""
    from hypothesis import strategies as st

    paths = list(_paths(document))
    value = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
        ),
        max_leaves=4,
    )

    def apply(changes):
        changed = json.loads(json.dumps(document))
        for path, new in changes:
            place = changed
            try:
                for step in path[:-1]:
                    place = place[step]
                place[path[-1]] = new
            except (KeyError, IndexError, TypeError):
                continue  # an earlier change took it away
        return changed

    change = st.tuples(st.sampled_from(paths), value)
    return st.lists(change, min_size=1, max_size=3).map(apply) | st.just(document)


def _paths(value, start=()):
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        yield (*start, key)
        if isinstance(inner, (dict, list)):
            yield from _paths(inner, (*start, key))


def pictures_target(folder: Path, mutated: Callable) -> dict[str, Target]:
    """Pictures in Pillow's own odd formats, looked at and read."""
    from hypothesis import strategies as st
    from PIL import Image

    from tfloop.data import pictures

    grey = Image.frombytes("L", (5, 4), bytes(range(20)))
    modes = {"png": "LA", "bmp": "P", "gif": "P", "tiff": "CMYK", "webp": "RGBA", "jpeg": "L"}
    modes |= {"ppm": "RGB", "tga": "RGBA", "pcx": "P", "sgi": "RGB", "ico": "RGBA", "dds": "RGBA"}
    originals = []
    for ending, mode in modes.items():
        buffer = io.BytesIO()
        grey.convert("RGB").convert(mode).save(buffer, ending)
        originals.append((ending, buffer.getvalue()))

    def run(case):
        ending, content = case
        path = folder / f"picture.{ending}"
        path.write_bytes(content)
        found = pictures.look(path)
        assert pictures.read(found, found.mode).shape[-1] == pictures.CHANNELS[found.mode]

    cases = [st.tuples(st.just(ending), mutated(content)) for ending, content in originals]
    return {"pictures": Target(st.one_of(cases), run)}


def run_targets(folder: Path, mutated: Callable) -> dict[str, Target]:
    """What lies in a run's folder, with other content and right sums, and archives of Keras."""
    import zipfile

    import keras
    from hypothesis import strategies as st

    import tfloop
    from tfloop.commands import scalars
    from tfloop.config import Config
    from tfloop.history.records import Records
    from tfloop.training import folders, keras_import, manifests, saved_run, session

    config = Config.make(
        "digits",
        conv=(2,),
        dense=(3,),
        epochs=1,
        validation_size=40,
        quiet=True,
        logdir=str(folder / "runs"),
        summaries="none",
    )
    run = Path(session.train(config)[0]["folder"])
    known = {name: json.loads((run / name).read_text()) for name in ("result.json", "config.json")}
    manifest_path = next(run.glob("checkpoints/*/manifest.json"))
    manifest = json.loads(manifest_path.read_text())
    del manifest["sha256_of_this"]
    group = {"folders": [run.name], "ensemble": 1}

    def write(path, content):
        path.write_text(json.dumps(content))

    def result(content):
        write(run / "result.json", content)
        try:
            folders.result(run)
            folders.all_finished([run])
            folders.epochs_done(run, config)
            Records(run)
            with contextlib.redirect_stdout(io.StringIO()):
                scalars._hparams([str(run)], "json", "")
        finally:
            write(run / "result.json", known["result.json"])

    def with_right_sum(content):
        write(manifest_path, {**content, "sha256_of_this": manifests.sum_of(content)})
        try:
            saved_run.open_run(run)
            Records(run)
        finally:
            write(manifest_path, {**manifest, "sha256_of_this": manifests.sum_of(manifest)})

    def of_group(content):
        write(run / "group.json", content)
        try:
            members, _ = folders.group_of(run)
            assert all(member.parent == run.parent for member in members)
        finally:
            (run / "group.json").unlink()

    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(2, 3, activation="relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Flatten(),
            keras.layers.Dense(3, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.save(folder / "model.keras")
    with zipfile.ZipFile(folder / "model.keras") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    state = tfloop.make_loop(config.replace(pool=(2,))).state
    images = tfloop.load("digits").test.inputs[:8]

    def archive_of(case):
        changed, weights = case
        path = folder / "changed.keras"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in entries.items():
                content = weights if name.endswith(".h5") else content
                content = json.dumps(changed) if name == "config.json" else content
                archive.writestr(name, content)
        keras_import.import_weights(state, path, images)

    configuration = json.loads(entries["config.json"])
    weights = next(content for name, content in entries.items() if name.endswith(".h5"))
    return {
        "result.json": Target(edited(known["result.json"]), result),
        "manifest, right sum": Target(edited(manifest), with_right_sum),
        "group.json": Target(edited(group), of_group),
        ".keras": Target(
            st.tuples(edited(configuration), st.just(weights))
            | st.tuples(st.just(configuration), mutated(weights)),
            archive_of,
        ),
    }


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
    "tfloop.data.shard_files",
    "tfloop.data.shard_index",
    "tfloop.data.shards",
    "tfloop.data.sources",
    "tfloop.data.tfrecords",
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


def limit_memory(gibibytes: float) -> None:
    """A case that takes more fails: what asks for it gets none."""
    with open("/proc/self/statm", encoding="ascii") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    most = taken + int(gibibytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument(
        "--memory", type=float, default=4.0, help="GiB that a case may take, beside what runs"
    )
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
        made = targets(Path(folder))
        limit_memory(options.memory)
        for name, target in made.items():
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
