#!/usr/bin/env bash
# Prepares, checks and times the trainer on a machine with NVIDIA cards, in one call; needs no network.
#
#   benchmarks/gpu.sh OUT [REFERENCE …]     a reference: a folder with an autoresearch-style train.py
#
# OUT gets progress, table.md and the logs. Other cards, budgets and data by the environment:
#   LIMIT_S=540     start nothing after that; what runs then is stopped
#   BUDGET_S=300    of each training                 PRESET=h100
#   GPUS=0,1        default: all                     DATA=DIR  prepared; default: source text of this machine's disk
# A run that was stopped has written its table as far as it came. Called again on the same machine, it finds its data and
# compiled code where they were.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${1:?"usage: benchmarks/gpu.sh OUT [REFERENCE …]"}
shift
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
PRESET=${PRESET:-h100} BUDGET_S=${BUDGET_S:-300} END_S=$(($(date +%s) + ${LIMIT_S:-540})) BEGAN_S=$(date +%s)
GPUS=${GPUS:-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd,)}
[ -n "$GPUS" ] || { echo "gpu.sh: no NVIDIA card is seen here; name cards with GPUS=0,1 (or GPUS=cpu PRESET=cpu for a dry run)" >&2; exit 2; }
mkdir -p "$OUT"
WORK=${WORK:-$(dirname "$(mktemp -u)")/raysearch-gpu-$(id -u)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 RAYSEARCH_CACHE=$WORK/raysearch
export TORCHINDUCTOR_CACHE_DIR=$WORK/inductor TRITON_CACHE_DIR=$WORK/triton
unset PYTHONDONTWRITEBYTECODE # without compiled modules, imports take three times as long

say() { echo "[$(($(date +%s) - BEGAN_S)) s] $*" | tee -a "$OUT/progress"; }
left_s() { local left=$((END_S - $(date +%s))); echo $((left > 1 ? left : 1)); }
trap 'kill $(jobs -p) 2>/dev/null' EXIT

# 1. the data, on the CPU, while the cards do the checks
data() {
    $PYTHON benchmarks/source_corpus.py --out "$WORK/text" &&
        $PYTHON -m trainer.prepare --dataset "files:$WORK/text" --vocab-size 8192 --row-tokens 2048 --data "$WORK/data"
}
if [ -z "${DATA:-}" ]; then
    DATA=$WORK/data
    [ -f "$DATA/manifest.json" ] || data >"$OUT/data.log" 2>&1 &
    DATA_JOB=$!
fi
SMALL=$WORK/sotu
$PYTHON -m trainer.prepare --dataset sotu --vocab-size 8192 --row-tokens 2048 --data "$SMALL" >"$OUT/small.log" 2>&1 ||
    { say "the embedded corpus could not be prepared: $(tail -n 1 "$OUT/small.log")"; exit 1; }

# 2. checks: a trial cold and warm on the first card, the kernels on the last one
mkdir -p "$OUT/smoke"
$PYTHON - "$PRESET" >"$OUT/smoke/train.py" <<'PROGRAM'
import sys
from raysearch.objective import base_program, load_presets
print(base_program(open("trainer/train.py").read(), load_presets()[sys.argv[1]]), end="")
PROGRAM
card() { if [ "$GPUS" = cpu ]; then env CUDA_VISIBLE_DEVICES= "${@:2}"; else env CUDA_VISIBLE_DEVICES="$1" "${@:2}"; fi; }
smoke() {
    card "${GPUS%%,*}" timeout 240 "$PYTHON" -P -m trainer.harness --train-file "$OUT/smoke/train.py" --data "$SMALL" \
        --out "$OUT/smoke/$1" --budget-s 3 >"$OUT/smoke/$1.log" 2>&1
    say "$1 trial: exit code $?, $(tail -n 1 "$OUT/smoke/$1.log")"
}
(smoke cold; smoke warm) &
SMOKE_JOB=$!
if [ "$GPUS" != cpu ]; then
    (
        card "${GPUS##*,}" timeout 240 "$PYTHON" -m pytest -q -m gpu tests/test_kernels.py -p no:cacheprovider >"$OUT/kernels.log" 2>&1
        say "kernels: $(tail -n 1 "$OUT/kernels.log")"
    ) &
    KERNELS_JOB=$!
fi
wait "$SMOKE_JOB"
grep -qs '"outcome": "measured"' "$OUT/smoke/warm/result.json" || { say "stopped: the trial failed"; exit 1; }
wait ${DATA_JOB:-} ${KERNELS_JOB:-}
[ -f "$DATA/manifest.json" ] || { say "stopped: no data, $(tail -n 1 "$OUT/data.log")"; exit 1; }

# 3. side by side; then what remains of the time for smaller cards
say "data and checks are done; $(left_s) s are left"
references=()
for reference; do references+=(--reference "$reference"); done
timeout "$(left_s)" "$PYTHON" benchmarks/trainer.py --data "$DATA" --out "$OUT/trainers" --gpus "$GPUS" --cache "$WORK" \
    --budget-s "$BUDGET_S" "${references[@]}" "$PRESET" "$PRESET@$((BUDGET_S / 2))" >"$OUT/trainers.log" 2>&1
say "trainers: exit code $?"
if [ "$GPUS" != cpu ] && [ "$(left_s)" -gt 120 ]; then
    timeout "$(left_s)" "$PYTHON" benchmarks/cards.py --data "$SMALL" --out "$OUT/cards" --gpus "$GPUS" --edits 30 --at-once 4 \
        --stop-after-s $(($(left_s) - 90)) >"$OUT/cards.log" 2>&1
    say "cards: $(tail -n 1 "$OUT/cards.log")"
fi
cp "$OUT/trainers/table.md" "$OUT/table.md" 2>/dev/null
cat "$OUT/table.md" 2>/dev/null
