#!/usr/bin/env bash
# Serves models/untrained and holds its answers against transformers'.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p target/parity
log=target/parity/worker.log
target/release/imagegpt serve --model models/untrained --execution-provider cpu \
    --listen 127.0.0.1:50152 --metrics-listen 127.0.0.1:9191 2>"$log" &
pid=$!
trap 'kill "$pid" 2>/dev/null || true' EXIT
scripts/await-ready.sh "$pid" 9191 "$log"
"$PARITY_VENV/bin/python" tests/parity/parity.py --endpoint 127.0.0.1:50152 --model models/untrained "$@"
