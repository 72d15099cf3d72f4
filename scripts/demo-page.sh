#!/usr/bin/env bash
# Serves models/emoji with all layers, its head and the page for browsers, says
# where the page is, and goes on until Ctrl-C.
set -euo pipefail
cd "$(dirname "$0")/.."
worker=${BINARY:-target/demo/imagegpt}
mkdir -p target/demo-pictures
log=target/demo-pictures/page.log
"$worker" serve --model models/emoji --feature-layer 8 --model-name emoji --cache-dir target/demo-pictures/models \
    --execution-provider cpu --head category=models/emoji/category.safetensors --playground \
    --listen "127.0.0.1:$PORT" --metrics-listen "127.0.0.1:$METRICS_PORT" 2>"$log" &
pid=$!
trap 'kill "$pid" 2>/dev/null || true' EXIT
scripts/await-ready.sh "$pid" "$METRICS_PORT" "$log"
echo "Look at http://127.0.0.1:$PORT/ (the log is in $log; Ctrl-C ends the worker)"
wait "$pid"
