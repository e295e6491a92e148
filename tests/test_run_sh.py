"""run.sh, with a stand-in for Python: it makes environments at once and notes pip's work."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parent.parent
STAND_IN = f"""#!/usr/bin/env bash
if [[ $0 == */tfloop ]]; then printf '<%s>' "$@"; exit ${{CODE:-0}}; fi
if [[ $0 == */lint-imports ]]; then echo lint-imports; exit; fi
case "$1 $2" in
  "-m venv")
    mkdir -p "$3/bin"
    for name in python tfloop lint-imports; do cp "$0" "$3/bin/$name"; done
    echo venv >>"$LOG" ;;
  "-m pip")
    echo pip "${{@: -1}}" >>"$LOG"
    [[ -z ${{KILL:-}} ]] || kill -9 $PPID
    exit ${{PIP:-0}} ;;
  "-m pytest") shift 2; printf 'pytest in %s:' "$PWD"; printf '<%s>' "$@" ;;
  "-m ruff" | "-m mypy") echo "${{*:2}}"; [[ "$*" != "${{FAIL:-}}" ]] ;;
  *) exec {sys.executable} "$@" ;;
esac
"""


@pytest.fixture
def run(tmp_path):
    """run("train", KILL="1"): run.sh in a folder with a space in its name, from another folder."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    for name in ("run.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (tmp_path / "python3").write_text(STAND_IN)
    (tmp_path / "python3").chmod(0o755)

    def call(*arguments, path=tmp_path, **environment):
        environment = {"PATH": f"{path}:/usr/bin:/bin", "LOG": str(tmp_path / "log"), **environment}
        return subprocess.run(
            ["bash", str(folder / "run.sh"), *arguments],
            capture_output=True,
            text=True,
            cwd="/",
            env=environment,
        )

    call.folder = folder
    call.log = lambda: (
        (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []
    )
    return call


def test_it_installs_once_and_passes_flags_and_exit_codes_through(run):
    first = run("train", "--name=a b", CODE="3")
    assert (first.stdout, first.returncode) == ("<train><--name=a b>", 3)
    assert run.log() == ["venv", f"pip {run.folder}"]
    started = time.perf_counter()
    again = run("train")
    assert time.perf_counter() - started < 1 and again.stderr == "" and len(run.log()) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_user_who_may_not_write_there_is_told_in_one_line(run):
    run.folder.chmod(0o500)
    done = run("train")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "may not be written by" in done.stderr


def test_the_tests_need_more_and_bring_what_train_needs(run):
    assert run("test", "-k", "a b").stdout == f"pytest in {run.folder}:<-k><a b>"
    assert run("train").stdout == "<train>"
    assert run.log() == ["venv", f"pip {run.folder}[test]"]


def test_lint_checks_format_style_types_and_imports_and_stops_at_the_first_that_fails(run):
    all_well = run("lint")
    assert all_well.stdout.splitlines() == [
        "ruff format --check .",
        "ruff check .",
        "mypy",
        "lint-imports",
    ]
    assert all_well.returncode == 0 and run.log() == ["venv", f"pip {run.folder}[dev]"]
    failed = run("lint", FAIL="-m ruff check .")
    assert failed.returncode != 0 and "mypy" not in failed.stdout


def test_bench_runs_a_benchmark_by_name_and_names_what_is_none(run):
    (run.folder / "benchmarks").mkdir()
    (run.folder / "benchmarks" / "ops.py").write_text("import sys; print(sys.argv[1:])")
    assert run("bench", "ops", "--rounds=1").stdout == "['--rounds=1']\n"
    wrong = run("bench", "../x")
    assert wrong.returncode == 2 and wrong.stderr.startswith(
        "run.sh: '../x' is no benchmark; choose from accuracy"
    )


def test_an_interrupted_installation_is_begun_again(run):
    assert run("train", KILL="1").returncode == -9
    assert run("train").stdout == "<train>"
    assert run.log() == ["venv", f"pip {run.folder}"] * 2


def test_a_failed_installation_says_so_and_is_repeated(run):
    failed = run("train", PIP="1")
    assert failed.returncode == 1 and "the installation failed; call again" in failed.stderr
    assert run("train").returncode == 0


def test_new_versions_are_installed(run):
    run("train")
    (run.folder / "constraints.txt").write_text("numpy==9\n")
    run("train")
    assert run.log() == ["venv", f"pip {run.folder}", f"pip {run.folder}"]


def test_without_a_suitable_python_it_says_what_is_missing(run, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    for name in ("python3", "python3.10", "python3.11", "python3.12", "python3.13", "python"):
        (old / name).write_text(
            "#!/bin/sh\n"
            "[ \"$2\" = 'import platform; print(platform.python_version())' ] || exit 1\n"
            "echo 3.8.1\n"
        )
        (old / name).chmod(0o755)
    found = run("train", path=old)
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith(
        "run.sh: needs Python 3.10, 3.11, 3.12 or 3.13 with its venv module"
    )
    assert "python3 (3.8.1)" in found.stderr and not (run.folder / ".venv").exists()
