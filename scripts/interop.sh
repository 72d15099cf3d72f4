#!/usr/bin/env bash
# Serves test models and calls them as clients of Triton and KServe do: compares
# every method and output with the native service, runs 64 callers of each at
# the same time, and measures the protocol's overhead with locust, and with
# perf_analyzer where it can run. $WORKER is the binary, $INTEROP_VENV has the
# clients (see Makefile).
set -euo pipefail
cd "$(dirname "$0")/.."
worker=${WORKER:-target/release/imagegpt}
python=$INTEROP_VENV/bin/python
port=${PORT:-50156}
metrics_port=${METRICS_PORT:-9196}
endpoint=127.0.0.1:$port
mkdir -p target/interop
log=target/interop/worker.log
pid=
trap '[ -z "$pid" ] || kill "$pid" 2>/dev/null || true' EXIT

# start MODEL [FLAG...]
start() {
    local model=$1
    shift
    echo "== $model $*"
    "$worker" serve --model "$model" --execution-provider cpu \
        --listen "$endpoint" --metrics-listen "127.0.0.1:$metrics_port" "$@" 2>"$log" &
    pid=$!
    scripts/await-ready.sh "$pid" "$metrics_port" "$log"
}

stop() {
    kill "$pid"
    wait "$pid"
    pid=
}

# A published export serves states and classes, a compiled model layers and
# likelihoods. Answers are compared bit by bit, so every image runs alone.
causal=target/interop/causal
rm -rf "$causal"
"$worker" compile tests/data/models/micro-causal --output "$causal" \
    --tasks embed,hidden,score >"$log"
for model in tests/data/models/micro "$causal"; do
    start "$model" --max-batch-size 1
    "$python" tests/interop/interop.py --endpoint "$endpoint" --model "$(basename "$model")"
    "$python" tests/interop/kserve_client.py --endpoint "$endpoint" --model "$(basename "$model")"
    stop
done

start tests/data/models/micro --fake-engine 500ms --max-batch-size 128 --max-queue-delay 0s
"$python" tests/interop/fleet.py --endpoint "$endpoint" --model micro \
    --metrics "127.0.0.1:$metrics_port"
stop

start models/untrained --fake-engine 2ms
scripts/perf-analyzer.sh "$endpoint" untrained
"$INTEROP_VENV/bin/locust" -f tests/interop/locustfile.py --headless -u 16 -r 16 -t 8s \
    --host "$endpoint" --only-summary
stop

start models/untrained --fake-engine 0s --max-queue-delay 0s --no-reflection
"$python" tests/interop/overhead.py --endpoint "$endpoint" --model untrained --pid "$pid"
stop
