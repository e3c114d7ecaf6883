#!/usr/bin/env bash
# Fifteen minutes on one H100 or H200: the GPU tests, end-to-end training beside transformers, and the kernels' benches.
#
#   kernels/gpu.sh [FOLDER]             writes environment.txt, tests.txt, training.md, training.jsonl and kernels.txt
#   kernels/gpu.sh --rehearse [FOLDER]  runs the same steps on a CPU with small models, in about five minutes
#
# PYTHON names the interpreter (default: .venv/bin/python, else python3), MINUTES the time (default: 15).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

rehearse=()
if [ "${1:-}" = --rehearse ]; then
  rehearse=(--rehearse)
  shift
fi
folder=$(realpath -m "${1:-gpu-$(date -u +%Y-%m-%d)}")
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
end=$((SECONDS + 60 * ${MINUTES:-15}))
failed=()
mkdir -p "$folder"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# limited NAME SECONDS COMMAND...: runs a step for so long at most, and for no longer than there is time
limited() {
  local name=$1 limit=$2 left=$((end - SECONDS)) began=$SECONDS
  shift 2
  if [ "$left" -le 0 ]; then
    printf '==> %s: left out, no time was left\n' "$name"
    failed+=("$name")
    return
  fi
  printf '==> %s\n' "$name"
  timeout "$((limit < left ? limit : left))" "$@" || failed+=("$name")
  printf '==> %s: %d s\n' "$name" "$((SECONDS - began))"
}

imports() {
  "$python" -c "import $1" >"$folder/import.txt" 2>&1
}

environment() {
  nvidia-smi 2>/dev/null || echo "no nvidia-smi"
  "$python" --version
  "$python" -m pip list --format=freeze 2>/dev/null | grep -iE '^(torch|triton|transformers|mamba|causal|lightning)'
  git rev-parse HEAD 2>/dev/null
}

if [ ${#rehearse[@]} -eq 0 ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: no CUDA device; kernels/gpu.sh --rehearse runs the steps on a CPU" >&2
  exit 2
fi
if [ ${#rehearse[@]} -eq 0 ] && ! imports mamba_ssm; then
  # Without it both sides take other kernels, and the tables say so.
  if timeout 180 "$python" -m pip install --no-build-isolation mamba-ssm causal-conv1d >"$folder/mamba-ssm.txt" 2>&1; then
    echo "==> mamba-ssm: installed"
  else
    echo "==> mamba-ssm: does not install here, see $folder/mamba-ssm.txt"
  fi
fi
environment >"$folder/environment.txt" 2>&1
imports mamba_ssm || tail -1 "$folder/import.txt" >>"$folder/environment.txt"
rm -f "$folder/import.txt"

limited tests 240 bash -c 'set -o pipefail; "$0" -m pytest -m gpu -q -p no:cacheprovider 2>&1 | tee "$1"' "$python" "$folder/tests.txt"
# The last measurement begins a minute before the end, and what is left is the kernels'.
within=$((end - SECONDS - 120))
limited training 600 "$python" -m explore.bench.gpu "$folder" --within "$((within > 30 ? within : 30))" \
  ${rehearse[@]+"${rehearse[@]}" --seconds 1}
bench=(); [ ${#rehearse[@]} -eq 0 ] || bench=(--model)
: >"$folder/kernels.txt"
for kernel in ssd_scan routed_experts linear_cross_entropy; do
  limited "$kernel" 120 bash -c '"$0" "kernels/$1/bench.py" "${@:3}" >>"$2" 2>&1' "$python" "$kernel" "$folder/kernels.txt" \
    ${bench[@]+"${bench[@]}"}
done

echo
cat "$folder/training.md"
echo "tables and logs: $folder"
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed or cut short: ${failed[*]}" >&2
  exit 1
fi
