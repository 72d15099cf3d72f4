#!/usr/bin/env bash
# What the scheduler promises, with an engine that takes 5 ms a batch and 1 ms
# an image: goodput and refusals under overload, interactive calls beside bulk,
# and beside clients that do not read. For `soak` as argument, ten minutes of
# everything at once instead, with every answer verified.
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
if [ "${1:-}" = soak ]; then
    shift
    bench soak --duration 10m "$@"
else
    bench overload
    bench mixed
    bench slow-reader
fi
kill "$pid"
wait "$pid"
