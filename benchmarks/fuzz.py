"""Damaged and invented input: every case must end in success or in one clear error, never in anything else.

    ./run.sh bench fuzz [--cases=2000 --only=npz]

Hypothesis makes the cases: valid files with bytes flipped, cut out, repeated and put in, JSON of any kind, and flags
with any value. What counts as clear is a UserError of one line, which the command line prints and exits with 2. A
checkpoint that was changed must never be taken for a good one.
"""

import contextlib
import io
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

from race import arguments, describe, environment, save, start_quietly, table


def targets(folder: Path) -> dict:
    """name → (strategy of cases, function that takes one; it raises what it likes)."""
    import gzip

    import numpy as np
    from hypothesis import strategies as st

    import tfloop
    from tfloop import checkpoints, cli, data, events
    from tfloop.commands import command
    from tfloop.config import FIELDS, Config
    from tfloop.errors import UserError

    def mutated(original: bytes):
        """`original` with up to six changes."""
        place = st.integers(0, max(len(original) - 1, 0))
        change = st.tuples(st.sampled_from(["set", "cut", "repeat", "insert", "end"]), place, st.integers(1, 64), st.binary(min_size=1, max_size=8))

        def apply(changes):
            found = bytearray(original)
            for kind, at, length, new in changes:
                if kind == "set":
                    found[at:at + len(new)] = new
                elif kind == "cut":
                    del found[at:at + length]
                elif kind == "repeat":
                    found[at:at] = found[at:at + length]
                elif kind == "insert":
                    found[at:at] = new
                else:
                    del found[at:]
            return bytes(found)

        return st.lists(change, min_size=1, max_size=6).map(apply) | st.binary(max_size=200)

    def file_target(name: str, original: bytes, read):
        path = folder / name

        def run(content: bytes):
            path.write_bytes(content)
            read(path)

        return mutated(original), run

    images = np.arange(2 * 5 * 4, dtype=np.uint8).reshape(2, 5, 4)
    idx = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in images.shape) + images.tobytes()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x_train=images, y_train=np.array([0, 1]), x_test=images, y_test=np.array([1, 0]))
    found = {"IDX": file_target("f-idx3-ubyte", idx, data.read_idx),
             "IDX, gzip": file_target("f-idx3-ubyte.gz", gzip.compress(idx), data.read_idx),
             "npz": file_target("f.npz", buffer.getvalue(), lambda path: data.load(str(path)))}

    text = json.dumps({"l2": 0.1, "conv": [3, 4], "optimizer": "adam", "epochs": 3, "momentum": None}).encode()
    value = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3), max_leaves=4)
    settings = st.dictionaries(st.sampled_from(sorted(FIELDS)) | st.text(max_size=6), value, max_size=4).map(lambda d: json.dumps(d).encode())
    strategy, read_config = file_target("config.json", text, lambda path: Config.make(**Config.read(path)))
    found["config.json"] = strategy | settings, read_config

    word = st.text(alphabet="0123456789.,-eainfNaN:/x ", max_size=6)
    flag = st.tuples(st.sampled_from(sorted(command.MODEL)), word | st.sampled_from(["3", "2,2", "relu", "same", "digits", "0.5", "mnist"]))

    def flags(chosen):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(["model", "--preset=digits", *(f"--{name}={value}" for name, value in chosen)])
        if code == 2 and (err.getvalue().count("\n") != 1 or not err.getvalue().startswith("tfloop: ")):
            raise AssertionError(f"not one clear line: {err.getvalue()!r}")
        if code == 2:
            raise UserError("as it should be")
        if code:
            raise AssertionError(f"exit code {code}")

    found["flags"] = st.lists(flag, min_size=1, max_size=3), flags

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
        if content != files[name] and (name != "manifest.json" or json.loads(content) != json.loads(files[name])):
            raise AssertionError(f"a changed {name} was taken for a good one")
        checkpoints.restore(state, path)

    found["checkpoint"] = st.one_of([st.tuples(st.just(name), mutated(content)) for name, content in files.items()]), checkpoint

    file = events.EventFile(folder / "events")
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb

    for step in range(4):
        file.write(step, scalar_pb("a", float(step)), scalar_pb("b", 1.0))
    file.close()
    written = next((folder / "events").iterdir())
    found["events"] = file_target("events/x.tfevents.1", written.read_bytes(), lambda path: events.read_scalars(path.parent))
    return found


def fuzz(name: str, strategy, run, cases: int) -> dict:
    """How many cases ended how, and the first that ended in neither success nor a clear error."""
    import hypothesis

    from tfloop.errors import UserError

    counts = {"success": 0, "clear error": 0}
    slowest = [0.0]

    @hypothesis.settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck), derandomize=True)
    @hypothesis.given(strategy)
    def check(case):
        started = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run(case)
            counts["success"] += 1
        except UserError as error:
            if "\n" in str(error):
                raise AssertionError(f"more than one line: {error}") from None
            counts["clear error"] += 1
        slowest[0] = max(slowest[0], time.perf_counter() - started)

    failure = None
    try:
        check()
    except BaseException as error:  # also what is no Exception
        failure = f"{type(error).__name__}: {error}"
    return {"target": name, **counts, "slowest_s": round(slowest[0], 3), "failure": failure}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--only", default="", help="a part of the target's name")
    options = parser.parse_args()
    start_quietly(shards=1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (strategy, run) in targets(Path(folder)).items():
            if options.only in name:
                rows.append(fuzz(name, strategy, run, options.cases))
                print(rows[-1], flush=True)
    found = environment()
    print(f"\n{describe(found)}\n")
    print(table(["target", "success", "clear error", "anything else", "slowest case, s"], [
        [row["target"], row["success"], row["clear error"], 1 if row["failure"] else 0, row["slowest_s"]] for row in rows]))
    save("fuzz", options.out, {"environment": found, "results": rows})
    sys.exit(1 if any(row["failure"] for row in rows) else 0)


if __name__ == "__main__":
    main()
