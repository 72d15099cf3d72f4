#!/usr/bin/env bash
# Serves models/untrained as published, and models/emoji compiled in fp32 and
# int8, and holds each worker's answers against transformers'.
set -euo pipefail
cd "$(dirname "$0")/.."
worker=target/release/imagegpt
port=50152
metrics_port=9191
mkdir -p target/parity
log=target/parity/worker.log
pid=
trap '[ -z "$pid" ] || kill "$pid" 2>/dev/null || true' EXIT
# compare MODEL [ARGUMENT...]: the arguments go to parity.py.
compare() {
    echo "== $1"
    "$worker" serve --model "$1" --execution-provider cpu \
        --listen "127.0.0.1:$port" --metrics-listen "127.0.0.1:$metrics_port" 2>"$log" &
    pid=$!
    scripts/await-ready.sh "$pid" "$metrics_port" "$log"
    "$PARITY_VENV/bin/python" tests/parity/parity.py --endpoint "127.0.0.1:$port" --model "$@"
    kill "$pid"
    wait "$pid"
    pid=
}
compare models/untrained
layers=$(grep -oE '"n_layer": [0-9]+' models/emoji/config.json | grep -oE '[0-9]+')
for precision in fp32 int8; do
    model=target/parity/emoji-$precision
    rm -rf "$model"
    "$worker" compile models/emoji --output "$model" --precision "$precision" \
        --tasks embed,hidden --feature-layer "$layers" >"$log"
    # Every fourth picture or so: transformers' own attention is slow.
    compare "$model" --checkpoint models/emoji --images 32
done
