#!/usr/bin/env bash
# Serves $MODEL, embeds and tokenizes the pictures in models/pictures over
# gRPC, prints who looks like whom and draws it; then ends the worker.
set -euo pipefail
cd "$(dirname "$0")/.."
worker=target/release/imagegpt
mkdir -p target/demo
log=target/demo/worker.log
"$worker" serve --model "$MODEL" --execution-provider cpu \
    --listen "127.0.0.1:$PORT" --metrics-listen "127.0.0.1:$METRICS_PORT" 2>"$log" &
pid=$!
trap 'kill "$pid" 2>/dev/null || true' EXIT
scripts/await-ready.sh "$pid" "$METRICS_PORT" "$log"
"$worker" neighbors models/pictures --white \
    --endpoint "http://127.0.0.1:$PORT" --picture target/demo/neighbors.png
kill "$pid"
wait "$pid"
