#!/usr/bin/env bash
# Measures the scheduler's promises with an engine that takes 5 ms per batch and
# 1 ms per image: goodput and refusals under overload, interactive calls beside
# bulk work, and beside clients that do not read.
set -euo pipefail
cd "$(dirname "$0")/.."
worker=target/release/imagegpt
mkdir -p target/bench
log=target/bench/scheduler.log
"$worker" serve --model "$MODEL" --fake-engine 5ms+1ms --max-queue-delay 0ms \
    --images-in-flight-max 256 --images-per-call-max 64 \
    --listen "127.0.0.1:$PORT" --metrics-listen "127.0.0.1:$METRICS_PORT" 2>"$log" &
pid=$!
trap 'kill "$pid" 2>/dev/null || true' EXIT
scripts/await-ready.sh "$pid" "$METRICS_PORT" "$log"
bench() {
    "$worker" bench --endpoint "http://127.0.0.1:$PORT" --pid "$pid" \
        --json "target/bench/$1.json" "$@"
}
bench overload
bench mixed
bench slow-reader
kill "$pid"
wait "$pid"
