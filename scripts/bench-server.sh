#!/usr/bin/env bash
# Prices the server alone: $MODEL's sizes with an engine that costs nothing.
# Prints requests a second a core at saturation (64 callers, one image a call,
# as tokens), the latency that the server adds at half of that, and at 4,000
# requests a second, which leave this tool room on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
worker=target/release/imagegpt
mkdir -p target/bench
log=target/bench/worker.log
# Without a queue delay: it is a wait that is asked for, not a cost.
"$worker" serve --model "$MODEL" --fake-engine 0s --max-queue-delay 0ms \
    --listen "127.0.0.1:$PORT" --metrics-listen "127.0.0.1:$METRICS_PORT" 2>"$log" &
pid=$!
trap 'kill "$pid" 2>/dev/null || true' EXIT
scripts/await-ready.sh "$pid" "$METRICS_PORT" "$log"
"$worker" bench load --endpoint "http://127.0.0.1:$PORT" --pid "$pid" \
    --callers 64 --of-saturation 50 \
    --json target/bench/server.json --plot target/bench/server.svg "$@"
"$worker" bench load --endpoint "http://127.0.0.1:$PORT" --pid "$pid" --rate 4000 "$@"
kill "$pid"
wait "$pid"
