#!/usr/bin/env bash
# Serves models/untrained as published, and models/emoji compiled in fp32 and
# int8, and compares each worker's answers with those of transformers; then
# compares generation and scores.
set -euo pipefail
cd "$(dirname "$0")/.."
worker=target/release/imagegpt
port=50152
metrics_port=9191
mkdir -p target/parity
log=target/parity/worker.log
pid=
trap '[ -z "$pid" ] || kill "$pid" 2>/dev/null || true' EXIT
# compare MODEL SCRIPT [ARGUMENT...]: the arguments go to the script.
compare() {
    local model=$1 script=$2
    shift 2
    echo "== $model"
    "$worker" serve --model "$model" --execution-provider cpu \
        --listen "127.0.0.1:$port" --metrics-listen "127.0.0.1:$metrics_port" 2>"$log" &
    pid=$!
    scripts/await-ready.sh "$pid" "$metrics_port" "$log"
    "$PARITY_VENV/bin/python" "tests/parity/$script" --endpoint "127.0.0.1:$port" "$@"
    kill "$pid"
    wait "$pid"
    pid=
}
compare models/untrained parity.py --model models/untrained
layers=$(grep -oE '"n_layer": [0-9]+' models/emoji/config.json | grep -oE '[0-9]+')
for precision in fp32 int8; do
    model=target/parity/emoji-$precision
    rm -rf "$model"
    "$worker" compile models/emoji --output "$model" --precision "$precision" \
        --tasks embed,hidden --feature-layer "$layers" >"$log"
    # About every fourth picture, since transformers' own attention is slow.
    compare "$model" parity.py --model "$model" --checkpoint models/emoji --images 32
done
model=target/parity/emoji-causal
rm -rf "$model"
"$worker" compile models/emoji --output "$model" --tasks score,generate >"$log"
compare "$model" generate_parity.py --checkpoint models/emoji
