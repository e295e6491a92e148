#!/usr/bin/env bash
# Set everything up beside this file, once, and run a tfloop command:
#
#   ./run.sh train [flags]     train the article's CNN on MNIST
#   ./run.sh test [arguments]  run the tests with pytest; --quick runs a minute's selection
#   ./run.sh lint              check format, style, types and imports
#   ./run.sh bench NAME [...]  run a benchmark; peers also installs PyTorch and JAX
#   ./run.sh --help            list the other commands
#
# Needs bash and a Python from 3.10 to 3.13; PYTHON=/path/to/python chooses one.
# Everything is installed into .venv.
# Exit codes are those of the command. 2: no suitable Python. 1: the installation failed.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
venv=$here/.venv
python=$venv/bin/python

fail() { printf 'run.sh: %s\n' "$2" >&2; exit "$1"; }

suits() {  # suits COMMAND: a Python of the right version that can make environments
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
    >/dev/null 2>&1
}

version_of() {
  "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo 'does not run'
}

find_python() {
  local candidate seen=()
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.1{3,2,1,0} python; do
    command -v -- "$candidate" >/dev/null || continue
    suits "$candidate" && { printf '%s\n' "$candidate"; return; }
    seen+=("$candidate ($(version_of "$candidate"))")
  done
  fail 2 "needs Python 3.10, 3.11, 3.12 or 3.13 with its venv module \
(Debian: apt install python3 python3-venv); found: ${seen[*]:-none}"
}

# install_for EXTRA: the package with its pinned dependencies, unless this very state is installed
install_for() {
  local extra=$1 state found
  state=$(cat "$here/pyproject.toml" "$here/constraints.txt"; printf '%s' "$here")
  [[ -x $python && -f $venv/.installed-$extra &&
    $(<"$venv/.installed-$extra") == "$state" ]] && return
  local place=$venv
  [[ -e $venv ]] || place=$here
  [[ -w $place ]] || fail 1 "$place may not be written by $(id -un), so nothing can be installed \
there; copy the project to a folder of your own"
  # An interrupted installation can leave packages that pip takes for whole: begin again.
  if [[ -e $venv/.installing || ! -x $python ]]; then
    found=$(find_python)
    echo "run.sh: setting up $venv with $("$found" --version)" >&2
    rm -rf -- "$venv"
    mkdir -p -- "$venv" && : >"$venv/.installing"
    "$found" -m venv "$venv" || fail 1 "could not make $venv"
  fi
  : >"$venv/.installing"
  if [[ $extra == bench ]] && ! command -v nvidia-smi >/dev/null; then install_torch_for_cpu; fi
  echo "run.sh: installing tfloop${extra:+ and what '$extra' needs}; this takes a minute or two" >&2
  "$python" -m pip install -q --disable-pip-version-check \
    -c "$here/constraints.txt" -e "$here${extra:+[$extra]}" >&2 ||
    fail 1 "the installation failed; call again to repeat it"
  printf '%s' "$state" >"$venv/.installed-$extra"
  printf '%s' "$state" >"$venv/.installed-"
  rm -- "$venv/.installing"
}

# Without a GPU, PyTorch's build for CPUs, from its own index: PyPI's brings gigabytes of CUDA along
# on Linux. Where that index cannot be reached, pip takes what it finds elsewhere.
install_torch_for_cpu() {
  "$python" -m pip install -q --disable-pip-version-check --no-deps --retries 1 --timeout 20 \
    -c "$here/constraints.txt" --extra-index-url https://download.pytorch.org/whl/cpu torch >&2 ||
    echo "run.sh: no PyTorch for CPUs to be had; trying the usual one" >&2
}

lint() {
  cd -- "$here"
  "$python" -m ruff format --check . &&
    "$python" -m ruff check . &&
    "$python" -m mypy &&
    "$venv/bin/lint-imports"
}

benchmark() {  # benchmark NAME [arguments]
  local names="accuracy cluster devices ensemble fuzz kill models ops overhead peers regress scaling \
stability streaming sweep"
  [[ " $names " == *" ${1:-} "* ]] || fail 2 "'${1:-}' is no benchmark; choose from ${names// /, }"
  case $1 in
    peers) install_for bench ;;  # the others need no rivals, or leave them out
    fuzz) install_for test ;;
    *) install_for "" ;;
  esac
  exec "$python" "$here/benchmarks/$1.py" "${@:2}"
}

case ${1:-} in
  test) install_for test; cd -- "$here"; exec "$python" -m pytest "${@:2}" ;;
  lint) install_for dev; lint ;;
  bench) benchmark "${@:2}" ;;
  *) install_for ""; exec "$venv/bin/tfloop" "$@" ;;  # -m would put the current folder on sys.path
esac
