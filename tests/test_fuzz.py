"""A quick run of the fuzzers; `./run.sh bench fuzz` is the long one."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import fuzz

NAMES = (
    "IDX",
    "IDX, gzip",
    "npz",
    "config.json",
    "flags",
    "checkpoint",
    "events",
    "shards",
    "TF_CONFIG",
    "pictures",
    "result.json",
    "manifest, right sum",
    "group.json",
    ".keras",
)


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return fuzz.targets(tmp_path_factory.mktemp("fuzz"))


def test_every_target_is_fuzzed(targets):
    assert tuple(targets) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_case_ends_in_success_or_in_one_clear_line(targets, name):
    slow = name in ("manifest, right sum", ".keras")
    found = fuzz.fuzz(name, targets[name], cases=20 if slow else 100)
    assert found["failure"] is None
    assert found["clear error"] > 0 and found["success"] > 0 and found["slowest_s"] < 10


@pytest.mark.quick
def test_the_fuzzers_can_fail(targets):
    def crash(case):
        raise KeyError("no UserError")

    assert "KeyError" in fuzz.fuzz("IDX", targets["IDX"]._replace(run=crash), cases=10)["failure"]


@pytest.mark.in_full
def test_the_readers_stand_a_fuzzer_that_sees_what_it_reaches():
    """The shards' is the longest of them; `./run.sh bench fuzz --guided` has all."""
    pytest.importorskip("atheris")
    found = fuzz.fuzz_guided("shards", cases=200)
    assert (
        found["failure"] is None
        and found["success"] + found["clear error"] == 200
        and found["reached"] > 20
    )
