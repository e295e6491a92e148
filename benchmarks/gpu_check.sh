#!/usr/bin/env bash
# Everything that needs a GPU, within 8 minutes: agreement with the CPU, bit-equal repeats, memory settings, peers,
# devices, the speedrun, ops, several models side by side.
#
#   benchmarks/gpu_check.sh OUT [PYTHON]     # JSON goes to OUT; PYTHON has TensorFlow's GPU build (default: .venv's, or python3)
#
# Parts that time does not suffice for are left out by name. Where TensorFlow sees no GPU it says so and exits with 0;
# with 3 where the machine has one all the same.
set -uo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
out=$(mkdir -p -- "${1:?usage: gpu_check.sh OUT [PYTHON]}" && cd -- "$1" && pwd)
python=${2:-$here/../.venv/bin/python}
[[ -x $python ]] || python=$(command -v python3)
python=$(realpath -s -- "$python")
export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH} TF_CPP_MIN_LOG_LEVEL=3 PYTHONUNBUFFERED=1
export TF_FORCE_GPU_ALLOW_GROWTH=true CUDA_CACHE_MAXSIZE=4294967296  # kernels compiled from PTX at first use are kept
total=470

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
  0) ;;
  4) if nvidia-smi -L 2>/dev/null | grep -q GPU; then
       TF_CPP_MIN_LOG_LEVEL=0 probe
       echo "gpu_check: the machine has a GPU that TensorFlow cannot use; its reasons are above"; exit 3
     fi
     echo "gpu_check: no GPU here, nothing to check"; exit 0 ;;
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
train=("$python" -m tfloop train --preset=digits --epochs=1 --quiet --device=gpu --logdir="$scratch")
tests=("$python" -m pytest "$here/../tests/test_gpu.py" -q -p no:cacheprovider -o addopts=)
"$python" -c "import xdist" 2>/dev/null && tests+=(-n 4)
cd "$here/.." || exit 2
part warm-up 60 "${train[@]}"
part warm-up-xla 60 "${train[@]}" --jit_compile
part gpu-tests 120 "${tests[@]}"
part peers 150 "$python" "$here/peers.py" --rounds=5 --seconds=0.5 --out="$out" --plot
part devices 120 "$python" "$here/devices.py" --repeats=1 --epochs=2 --only=GPU --out="$out" --plot
part speedrun 40 "$python" "$here/accuracy.py" --preset=speedrun --seeds=0,1,2 --target=0.9935 --out="$out"
part ops 40 "$python" "$here/ops.py" --rounds=3 --seconds=0.3 --out="$out" --only=article2
part ensemble 40 "$python" "$here/ensemble.py" --rounds=3 --seconds=0.5 --members=1,4 --presets=speedrun --out="$out"
part peers-tf32 60 "$python" "$here/peers.py" --rounds=3 --seconds=0.5 --out="$out/tf32" --precision=tf32 --only="XLA,compiled,JAX"
part devices-cpu 40 "$python" "$here/devices.py" --repeats=1 --epochs=1 --only=cores --out="$out/cpu"
echo
echo "== summary"
for name in "${names[@]}"; do
  case " ${failed[*]-} " in *" $name "*) echo "$name: failed, or no time for it" ;; *) echo "$name: done" ;; esac
done
[[ ${#failed[@]} -eq 0 ]]
