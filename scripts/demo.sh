#!/usr/bin/env bash
# Compiles models/emoji once, serves it with its head, embeds, classifies and
# tokenizes the pictures in models/pictures over gRPC, prints who looks like
# whom and draws it; then ends the worker. The model was trained on none of
# these pictures.
set -euo pipefail
cd "$(dirname "$0")/.."
worker=target/release/imagegpt
mkdir -p target/demo
log=target/demo/worker.log
"$worker" serve --model models/emoji --feature-layer 8 --model-name emoji --cache-dir target/demo/models \
    --execution-provider cpu --head category=models/emoji/category.safetensors \
    --listen "127.0.0.1:$PORT" --metrics-listen "127.0.0.1:$METRICS_PORT" 2>"$log" &
pid=$!
trap 'kill "$pid" 2>/dev/null || true' EXIT
scripts/await-ready.sh "$pid" "$METRICS_PORT" "$log"
"$worker" neighbors models/pictures --white --head category \
    --endpoint "http://127.0.0.1:$PORT" --picture target/demo/neighbors.png
kill "$pid"
wait "$pid"
