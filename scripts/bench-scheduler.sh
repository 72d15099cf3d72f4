#!/usr/bin/env bash
# Measures the scheduler's promises with an engine that takes 5 ms per batch and
# 1 ms per image: goodput and refusals under overload, interactive calls beside
# bulk work, and beside clients that do not read. With the argument `soak`, runs
# all of these together for ten minutes instead, as two callers with names, and
# verifies every answer.
set -euo pipefail
cd "$(dirname "$0")/.."
worker=target/release/imagegpt
mkdir -p target/bench
log=target/bench/scheduler.log
flags=()
if [ "${1:-}" = soak ]; then
    scratch=$(mktemp -d)
    for name in one other; do
        (umask 077 && od -An -N16 -tx1 /dev/urandom | tr -d ' \n' >"$scratch/$name")
        (umask 077 && echo "$name $(cat "$scratch/$name")" >>"$scratch/tokens")
    done
    flags=(--auth-tokens-file "$scratch/tokens")
fi
"$worker" serve --model "$MODEL" --fake-engine 5ms+1ms --max-queue-delay 0ms \
    --images-in-flight-max 256 --images-per-call-max 64 \
    --listen "127.0.0.1:$PORT" --metrics-listen "127.0.0.1:$METRICS_PORT" "${flags[@]}" 2>"$log" &
pid=$!
trap 'kill "$pid" 2>/dev/null || true; rm -rf "${scratch:-}"' EXIT
scripts/await-ready.sh "$pid" "$METRICS_PORT" "$log"
bench() {
    "$worker" bench --endpoint "http://127.0.0.1:$PORT" --pid "$pid" \
        --json "target/bench/$1.json" "$@"
}
if [ "${1:-}" = soak ]; then
    shift
    "$worker" bench soak --endpoint "http://127.0.0.1:$PORT" --pid "$pid" --duration 10m \
        --token-file "$scratch/other" --json target/bench/soak-other.json "$@" \
        >target/bench/soak-other.log 2>&1 &
    other=$!
    trap 'kill "$other" "$pid" 2>/dev/null || true; rm -rf "$scratch"' EXIT
    bench soak --duration 10m --token-file "$scratch/one" "$@"
    wait "$other" || { tail -20 target/bench/soak-other.log >&2; exit 1; }
    for name in one other; do
        # A caller whose calls were not counted under its name had none.
        curl -sS "http://127.0.0.1:$METRICS_PORT/metrics" |
            grep '^imagegpt_requests_total{.*code="OK",caller="'"$name"'"}' >&2
    done
else
    bench overload
    bench mixed
    bench slow-reader
fi
kill "$pid"
wait "$pid"
