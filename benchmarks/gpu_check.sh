#!/usr/bin/env bash
# Everything that needs a GPU, within 10 minutes: agreement with the CPU, bit-equal repeats, memory settings, every
# model against a plain loop, peers, devices by step and by layer, profiles, XLA's graphs and stacked models, models of
# other kinds, the speedrun, ops, several models side by side.
#
#   benchmarks/gpu_check.sh OUT [PYTHON]               # JSON goes to OUT; PYTHON has TensorFlow's GPU build
#   benchmarks/gpu_check.sh --rehearse OUT [PYTHON]    # the same on a CPU, as short as can be: does all of it run?
#
# PYTHON is .venv's where it is left out, or python3.
# Parts that time does not suffice for are left out by name. Where TensorFlow sees no GPU it says so and exits with 0;
# with 3 where the machine has one all the same.
set -uo pipefail
rehearse=
[[ ${1:-} == --rehearse ]] && { rehearse=1; shift; }
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
out=$(mkdir -p -- "${1:?usage: gpu_check.sh [--rehearse] OUT [PYTHON]}" && cd -- "$1" && pwd)
python=${2:-$here/../.venv/bin/python}
[[ -x $python ]] || python=$(command -v python3)
python=$(realpath -s -- "$python")
export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH} TF_CPP_MIN_LOG_LEVEL=3 PYTHONUNBUFFERED=1
export TF_FORCE_GPU_ALLOW_GROWTH=true CUDA_CACHE_MAXSIZE=4294967296  # kernels compiled from PTX at first use are kept
total=${rehearse:+1800} device=cpu
total=${total:-560}

probe() {
  "$python" - <<'PY'
import sys, tensorflow as tf
found = tf.config.list_physical_devices("GPU")
print(f"TensorFlow {tf.__version__} sees {len(found)} GPU" + "s" * (len(found) != 1))
sys.exit(0 if found else 4)
PY
}
probe 2>"$out/probe.txt"
case $? in
  0) device=gpu ;;
  4) if [[ -n $rehearse ]]; then
       echo "a rehearsal on the CPU: no figure of it is one of a GPU"
     elif nvidia-smi -L 2>/dev/null | grep -q GPU; then
       TF_CPP_MIN_LOG_LEVEL=0 probe
       echo "gpu_check: the machine has a GPU that TensorFlow cannot use; its reasons are above"; exit 3
     else
       echo "gpu_check: no GPU here, nothing to check"; exit 0
     fi ;;
  *) tail -n 1 "$out/probe.txt"; echo "gpu_check: $python has no TensorFlow that starts"; exit 2 ;;
esac

names=() failed=()
part() {  # part NAME SECONDS COMMAND…: run it within its time and what is left of all, and note where it fails
  local name=$1 limit=$2 started=$SECONDS; shift 2
  names+=("$name")
  (( limit = limit < total - SECONDS ? limit : total - SECONDS ))
  echo; echo "== $name"
  if (( limit < 10 )); then echo "left out: no time"; failed+=("$name"); return; fi
  timeout -k 10 "$limit" "$@" 2>&1 | tee "$out/$name.txt" || failed+=("$name")
  echo "($((SECONDS - started)) s)"
}
scratch=$(mktemp -d) && trap 'rm -rf "$scratch"' EXIT
train=("$python" -m tfloop train --preset=digits --epochs=1 --quiet --device=$device --logdir="$scratch")
tests=("$python" -m pytest -q -p no:cacheprovider -o addopts=)
profile=("$python" -m tfloop profile --device=$device)
short() { [[ -n $rehearse ]] && echo "$1" || echo "$2"; }  # short REHEARSED REAL
rounds=$(short 1 5) few=$(short 1 3) seconds=$(short 0.05 0.5)
cd "$here/.." || exit 2
part warm-up 60 "${train[@]}"
part warm-up-xla 60 "${train[@]}" --jit_compile
part gpu-tests 120 "${tests[@]}" tests/test_gpu.py
part exactness $(short 300 90) "${tests[@]}" tests/test_any_model.py -k "compiled or XLA"
part peers $(short 400 150) "$python" "$here/peers.py" --rounds=$rounds --seconds=$seconds --out="$out" --plot
part profile $(short 120 40) "${profile[@]}" --json="$out/profile.json" --plot="$out/profile.png"
part profile-xla $(short 120 40) "${profile[@]}" $(short "" --jit_compile) --json="$out/profile-xla.json"
part by-layer $(short 200 90) "$python" "$here/devices.py" --by_layer ${rehearse:+--rehearse} --batches=$(short 64 64,256,1024) --out="$out"
part xla $(short 300 90) "$python" "$here/xla.py" ${rehearse:+--rehearse} --rounds=$few --seconds=$seconds --members=$(short 2 8) --out="$out"
part models $(short 300 120) "$python" "$here/models.py" --rounds=$few --seconds=$seconds --only="$(short mlp 'resnet;mobilenet;mlp')" --out="$out"
part devices $(short 200 120) "$python" "$here/devices.py" --repeats=1 --epochs=$(short 1 2) --only="$(short "plain forward" GPU)" --out="$out" --plot
part speedrun $(short 120 40) "$python" "$here/accuracy.py" --preset=speedrun --seeds=$(short 0 0,1,2) --target=0.9935 --out="$out"
part ops $(short 120 40) "$python" "$here/ops.py" --rounds=$few --seconds=$seconds --out="$out" --only=article2
part ensemble $(short 120 40) "$python" "$here/ensemble.py" --rounds=$few --seconds=$seconds --members=1,4 --presets=speedrun --out="$out"
part peers-tf32 $(short 300 60) "$python" "$here/peers.py" --rounds=$few --seconds=$seconds --out="$out/tf32" --precision=tf32 --only="XLA,compiled,JAX"
part devices-cpu $(short 120 40) "$python" "$here/devices.py" --repeats=1 --epochs=1 --only=cores --out="$out/cpu"
echo
echo "== summary"
for name in "${names[@]}"; do
  case " ${failed[*]-} " in *" $name "*) echo "$name: failed, or no time for it" ;; *) echo "$name: done" ;; esac
done
[[ ${#failed[@]} -eq 0 ]]
