#!/usr/bin/env bash
# A short study on one machine with two cards: the second is held to 12 GB and to the kernels of an older card, and so
# stands in for a consumer card. Two kinds of hardware, two ratchets, one study. Needs no network.
#
#   benchmarks/two_kinds.sh OUT prepare    text, data, and a study of very short trials that fills the compile caches
#   benchmarks/two_kinds.sh OUT study      the study; to be called after it, on the same machine
#
# OUT gets figures.json, report.md, results.tsv, progress.png, the console, the journal, logs.tar.gz and progress. What
# else there is to choose, by the environment:
#   LIMIT_S=560    all has ended by then              RESERVE_S=75     of that, for what runs at the end, and the report
#   BUDGET_S=15    of a trial (prepare: 3)            EVAL_TOKENS=2097152  that score a trial
#   TEXT_MB=400    of this machine's disk             SMOKE_S=240      most of the study that prepare runs
#   GPUS=UUID,UUID default: the first two; cpu: a dry run on two CPU slots, which are of one kind
#   IDEAS=1        0: nobody proposes anything but raysearch's own proposers
#
# The presets are made for 300 s: scored on as many tokens, trials of 15 s would mostly be evaluation. So the study runs
# from a copy of the code in which the presets score fewer; its profiles say how many.
set -uo pipefail
OUT=$(mkdir -p "${1:?"usage: benchmarks/two_kinds.sh OUT prepare|study"}" && cd "$1" && pwd) MODE=${2:-}
case $MODE in prepare | study) ;; *) echo "two_kinds.sh: '$MODE' is not known; known: prepare, study" >&2; exit 2 ;; esac
cd "$(dirname "$0")/.." || exit
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python" || echo python3)}
LIMIT_S=${LIMIT_S:-560} RESERVE_S=${RESERVE_S:-75} EVAL_TOKENS=${EVAL_TOKENS:-2097152} IDEAS=${IDEAS:-1}
BEGAN_S=$(date +%s) END_S=$(($(date +%s) + LIMIT_S)) HELD_GB=12 HELD_CAPABILITY=8.6
GPUS=${GPUS:-$(nvidia-smi --query-gpu=uuid --format=csv,noheader 2>/dev/null | head -n 2 | paste -sd,)}
if [ "$GPUS" = cpu ]; then
    DEVICE=cpu PRESETS=(cpu) KINDS=1 TEXT_MB=${TEXT_MB:-8}
else
    DEVICE=cuda PRESETS=(h100 rtx3060) KINDS=2 TEXT_MB=${TEXT_MB:-400}
    case $GPUS in
    *,*) ;;
    *) echo "two_kinds.sh: two NVIDIA cards are needed, seen here: '$GPUS'; GPUS=cpu makes a dry run" >&2; exit 2 ;;
    esac
fi
WORK=${WORK:-$(dirname "$(mktemp -u)")/raysearch-two-kinds-$(id -u)}
mkdir -p "$WORK"
export PYTHONUNBUFFERED=1 RAYSEARCH_CACHE=$WORK/raysearch RAYSEARCH_STUDIES=$WORK/studies
export RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0
# compiled modules halve the imports; and each kind of card has a compile cache of raysearch's own
unset PYTHONDONTWRITEBYTECODE TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR RAYSEARCH_MEMORY_GB RAYSEARCH_CAPABILITY

now_s() { date +%s; }
say() { echo "[$(($(now_s) - BEGAN_S)) s] $*" | tee -a "$OUT/progress"; }
die() { say "stopped: $*"; exit 1; }

# 1. a copy of the code, with smaller evaluations
rm -rf "$WORK/src" && mkdir "$WORK/src" && cp -r raysearch trainer benchmarks "$WORK/src/" && cd "$WORK/src" || exit
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ "$DEVICE" = cuda ]; then
    for preset in "${PRESETS[@]}"; do
        sed -i -E "s/^(eval_tokens|whole_tokens) = .*/\1 = $EVAL_TOKENS/" "trainer/presets/$preset.toml"
        [ "$(grep -cE "^(eval|whole)_tokens = $EVAL_TOKENS\$" "trainer/presets/$preset.toml")" = 2 ] ||
            die "preset $preset has not the two sizes of an evaluation any more"
    done
fi
$PYTHON -c '
import raysearch.run, raysearch.coordinator, raysearch.report, raysearch.executors.ray, raysearch.exporter
import raysearch.mirrors, raysearch.minds, raysearch.remote, raysearch.proposers.tune, ray.tune.search.optuna
import optuna, pynvml, git, trainer.prepare
' >"$OUT/progress" 2>&1 || die "something is not installed here: $(tail -n 1 "$OUT/progress")"

# 2. the data, one folder for both presets
data() {
    local preset
    $PYTHON benchmarks/source_corpus.py --out "$WORK/text" --mb "$TEXT_MB" || return
    for preset in "${PRESETS[@]}"; do
        $PYTHON -m trainer.prepare --preset "$preset" --dataset "files:$WORK/text" || return
    done
}
if [ "$MODE" = prepare ]; then
    data >"$WORK/data.log" 2>&1 || die "no data: $(tail -n 1 "$WORK/data.log")"
    say "data: $(grep -m 1 texts "$WORK/data.log")"
fi
[ -d "$WORK/text" ] || die "nothing is prepared in $WORK; call this script with prepare first"

# 3. Ray: a head without slots, and a node for each card, as if it were alone on its machine
MARK=two-kinds-$$-$BEGAN_S RAY_DIR=$(mktemp -d /tmp/two-XXXXXX) NODES=() STUDY_JOB='' PROPOSE_JOB='' # short, for sockets
PORT=$($PYTHON -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
end() {
    [ -z "$PROPOSE_JOB" ] || kill "$PROPOSE_JOB" 2>/dev/null
    [ -z "$STUDY_JOB" ] || kill -KILL "$STUDY_JOB" 2>/dev/null
    [ ${#NODES[@]} = 0 ] || kill "${NODES[@]}" 2>/dev/null
    # all that the nodes have started bear their mark: a raylet that drains takes half a minute
    $PYTHON -c 'import sys; from raysearch import leftovers; leftovers.end(lambda m: m.get("RAYSEARCH_BENCH") == sys.argv[1])' "$MARK"
    rm -rf "$RAY_DIR"
}
trap end EXIT
trap 'exit 143' TERM INT HUP
node() { # NAME [VARIABLE=VALUE …] -- [OPTION …]
    local log=$RAY_DIR/$1.log variables=(RAYSEARCH_BENCH="$MARK" SPT_NOENV=1) until_s=$(($(now_s) + 90))
    shift
    while [ "$1" != -- ]; do variables+=("$1"); shift; done
    shift
    env "${variables[@]}" "$PYTHON" -m ray.scripts.scripts start --block --node-ip-address=127.0.0.1 \
        --object-store-memory=104857600 --dashboard-agent-listen-port=0 "$@" </dev/null >"$log" 2>&1 &
    NODES+=($!)
    disown # bash would tell of its end
    until grep -qs 'Ray runtime started' "$log"; do
        kill -0 "${NODES[-1]}" 2>/dev/null && [ "$(now_s)" -lt $until_s ] || die "Ray did not start: $(tail -n 3 "$log" | paste -sd' ')"
        sleep 0.2
    done
}
worker() { # NAME [VARIABLE=VALUE …]
    local labels
    labels=$(env "${@:2}" "$PYTHON" -m raysearch.run node-labels 2>>"$OUT/progress") || die "no labels: $labels"
    say "node $1: $labels"
    if [ "$DEVICE" = cuda ]; then set -- "$@" -- --num-gpus=1; else set -- "$@" -- --num-gpus=0; fi
    node "$@" --address="127.0.0.1:$PORT" --num-cpus=1 --labels="$labels"
}
node head -- --head --port="$PORT" --include-dashboard=false --temp-dir="$RAY_DIR/ray" --num-cpus=0 --num-gpus=0
if [ "$DEVICE" = cuda ]; then
    worker whole CUDA_VISIBLE_DEVICES="${GPUS%%,*}"
    worker held CUDA_VISIBLE_DEVICES="${GPUS##*,}" RAYSEARCH_MEMORY_GB=$HELD_GB RAYSEARCH_CAPABILITY=$HELD_CAPABILITY
else
    worker one CUDA_VISIBLE_DEVICES=
    worker other CUDA_VISIBLE_DEVICES=
fi
say "Ray is up"

# 4. what a person would propose first for a budget that is a twentieth of the preset's
ideas() { # PROFILE
    case $1 in
    cpu) echo 'TOTAL_BATCH_SIZE=1024|twice as many steps' ;;
    *-${HELD_GB}gb)
        echo 'TOTAL_BATCH_SIZE=65536|twice as many steps in a short budget'
        echo 'NGRAM_ROWS=65536|a table of the last few tokens learns fast'
        ;;
    *)
        echo 'TOTAL_BATCH_SIZE=65536|twice as many steps in a short budget'
        echo 'DEPTH=8 MODEL_DIM=512|a smaller model reads more tokens in a short budget'
        ;;
    esac
}
propose() { # STUDY: for each profile, as soon as it is there
    local repo=$RAYSEARCH_STUDIES/$1/repo told=' ' slug settings why
    until [ "$(echo "$told" | wc -w)" = "$KINDS" ]; do
        sleep 1
        for slug in $(git -C "$repo" for-each-ref --format='%(refname:lstrip=3)' refs/heads/ratchet 2>/dev/null); do
            case $told in *" $slug "*) continue ;; esac
            git -C "$repo" show "ratchet/$slug:train.py" >"$WORK/base.py" || continue
            while IFS='|' read -r settings why; do
                # shellcheck disable=SC2086 # several settings are several arguments
                $PYTHON benchmarks/two_kinds.py edit "$WORK/base.py" $settings >"$WORK/train.py" &&
                    $PYTHON -m raysearch.run propose "$WORK/train.py" --study "$1" --profile "$slug" --why "$why"
            done < <(ideas "$slug")
            told+="$slug "
        done
    done
}

# 5. the study: one Ctrl-C in time, so that what runs then comes to its end
run_study() { # NAME STOP_AT [OPTION …]
    local name=$1 stop_s=$2 last_s=$((END_S - 25)) asked=0 code
    shift 2
    rm -rf "${RAYSEARCH_STUDIES:?}/$name"
    $PYTHON -m raysearch.run --study "$name" --address "127.0.0.1:$PORT" --dataset "files:$WORK/text" --judge race \
        --baseline-runs 2 --device "$DEVICE" "$@" </dev/null >"$OUT/console.log" 2>&1 &
    STUDY_JOB=$!
    if [ "$IDEAS" != 0 ]; then
        propose "$name" >"$WORK/propose.log" 2>&1 &
        PROPOSE_JOB=$!
    fi
    while kill -0 "$STUDY_JOB" 2>/dev/null; do
        if [ "$asked" = 0 ] && [ "$(now_s)" -ge "$stop_s" ]; then
            asked=1 && say "the runs in flight are the last" && kill -INT "$STUDY_JOB"
        elif [ "$asked" = 1 ] && [ "$(now_s)" -ge "$last_s" ]; then
            asked=2 && say "the runs in flight are ended" && kill -INT "$STUDY_JOB"
        fi
        sleep 0.5
    done
    wait "$STUDY_JOB"
    code=$? STUDY_JOB=''
    say "study $name: exit code $code"
}
collect() { # NAME
    local study=$RAYSEARCH_STUDIES/$1 file
    for file in report.md results.tsv progress.png; do cp "$study/$file" "$OUT/" 2>/dev/null; done
    $PYTHON benchmarks/two_kinds.py figures "$study" "$OUT" || say "no figures"
    tar -czf "$OUT/logs.tar.gz" --exclude=documents.npz --exclude=sockets --exclude='*.sock' --ignore-failed-read \
        -C "$RAYSEARCH_STUDIES" "$1/trials" "$1/study.toml" "$1/repo" \
        -C "$WORK" data.log propose.log -C "$RAY_DIR" . 2>/dev/null
}
if [ "$MODE" = prepare ]; then
    stop_s=$(($(now_s) + ${SMOKE_S:-240}))
    [ $stop_s -lt $((END_S - RESERVE_S)) ] || stop_s=$((END_S - RESERVE_S))
    # nobody but the person, and what travels to the other card: it ends by itself
    run_study smoke $stop_s --budget-s "${BUDGET_S:-3}" --proposers transfer
    collect smoke
else
    run_study two $((END_S - RESERVE_S)) --budget-s "${BUDGET_S:-15}"
    collect two
fi
say "done"
