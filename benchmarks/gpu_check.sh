#!/usr/bin/env bash
# Everything that needs a GPU, within about 8 minutes: agreement with the CPU, bit-equal repeats, memory settings,
# devices, peers, ops, several models side by side, the speedrun.
#
#   benchmarks/gpu_check.sh OUT [PYTHON]     # JSON goes to OUT; PYTHON has TensorFlow's GPU build (default: .venv's, or python3)
#
# Where TensorFlow sees no GPU it says so and exits with 0.
set -uo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
out=$(mkdir -p -- "${1:?usage: gpu_check.sh OUT [PYTHON]}" && cd -- "$1" && pwd)
python=${2:-$here/../.venv/bin/python}
[[ -x $python ]] || python=$(command -v python3)
export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH} TF_CPP_MIN_LOG_LEVEL=3 PYTHONUNBUFFERED=1

"$python" - 2>/dev/null <<'PY'
import sys, tensorflow as tf
found = tf.config.list_physical_devices("GPU")
print(f"TensorFlow {tf.__version__} sees {len(found)} GPU" + "s" * (len(found) != 1))
sys.exit(0 if found else 4)
PY
case $? in
  0) ;;
  4) echo "gpu_check: no GPU here, nothing to check"; exit 0 ;;
  *) echo "gpu_check: $python has no TensorFlow"; exit 2 ;;
esac

failed=()
part() {  # part NAME SECONDS COMMAND…: run it within its time, and note where it fails
  local name=$1 limit=$2 started=$SECONDS; shift 2
  echo; echo "== $name"
  timeout "$limit" "$@" 2>&1 | tee "$out/$name.txt" || { failed+=("$name"); }
  echo "($((SECONDS - started)) s)"
}
part gpu-tests 120 "$python" -m pytest "$here/../tests" -q -m gpu -p no:cacheprovider -o addopts=
part devices 150 "$python" "$here/devices.py" --repeats=3 --epochs=2 --only=GPU --out="$out" --plot
part devices-cpu 60 "$python" "$here/devices.py" --repeats=1 --epochs=1 --only=cores --out="$out/cpu"
part peers 200 "$python" "$here/peers.py" --rounds=5 --seconds=0.5 --out="$out" --plot --only="fit,guide,PyTorch,JAX"
part peers-tf32 100 "$python" "$here/peers.py" --rounds=3 --seconds=0.5 --out="$out/tf32" --precision=tf32 --only="fit,PyTorch,JAX"
part ops 60 "$python" "$here/ops.py" --rounds=3 --seconds=0.3 --out="$out" --only=article2
part ensemble 60 "$python" "$here/ensemble.py" --rounds=3 --seconds=0.5 --members=1,4 --out="$out"
part speedrun 60 "$python" "$here/accuracy.py" --preset=speedrun --seeds=0,1,2 --target=0.9935 --out="$out"
echo
echo "== summary"
for name in gpu-tests devices devices-cpu peers peers-tf32 ops ensemble speedrun; do
  case " ${failed[*]-} " in *" $name "*) echo "$name: failed or ran out of time" ;; *) echo "$name: done" ;; esac
done
[[ ${#failed[@]} -eq 0 ]]
