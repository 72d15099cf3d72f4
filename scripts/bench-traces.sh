#!/usr/bin/env bash
# Measures what traces cost: requests per second and core of the server alone (an
# engine that runs no model, 64 callers, one image of tokens per call), without a
# collector and with one call in a hundred sampled. Both workers run all the time,
# and are measured for two seconds each in turns, so that a clock that changes within
# seconds changes both. Prints the medians, and the median of the ratios of
# neighboring measurements with its 95 % interval (bootstrap).
#
#   BINARY   the program
#   PYTHON   an interpreter with grpcio and opentelemetry-proto, for the collector
#   ROUNDS   turns (40)
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mktemp -d)
processes=()
trap 'kill "${processes[@]}" 2>/dev/null || true; rm -rf "$out"' EXIT

"$PYTHON" - "$out/port" <<'PY' &
import sys, threading
from concurrent import futures
import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc

class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def Export(self, request, context):
        return pb.ExportTraceServiceResponse()

server = grpc.server(futures.ThreadPoolExecutor(1))
trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
open(sys.argv[1], "w").write(str(port))
threading.Event().wait()
PY
processes+=($!)
until [ -s "$out/port" ]; do sleep 0.1; done
collector=http://127.0.0.1:$(cat "$out/port")

# usage: start NAME PORT METRICS_PORT FLAG...
start() {
    local name=$1 port=$2 metrics=$3
    shift 3
    taskset -c 0 "$BINARY" serve --model "$MODEL" --fake-engine 0s --max-queue-delay 0ms \
        --listen "127.0.0.1:$port" --metrics-listen "127.0.0.1:$metrics" "$@" \
        2>"$out/log-$name" &
    pids[$name]=$!
    processes+=("$!")
    scripts/await-ready.sh "$!" "$metrics" "$out/log-$name"
}

# usage: measure NAME PORT
measure() {
    taskset -c 1 "$BINARY" bench saturate --endpoint "http://127.0.0.1:$2" --pid "${pids[$1]}" \
        --callers 64 --duration 2s --warm-up 200ms --json "$out/$1-$turn.json" >"$out/text" 2>&1
}

declare -A pids
start off "$PORT" "$METRICS_PORT"
start sampled "$((PORT + 2))" "$((METRICS_PORT + 2))" \
    --otlp-endpoint "$collector" --otlp-sample-ratio 0.01
# The first turns, in which memory is allocated, are not counted.
for turn in warm-a warm-b $(seq "${ROUNDS:-40}"); do
    # The order changes, so that neither worker is always first.
    if [[ $turn == *[02468] ]]; then
        measure off "$PORT" && measure sampled "$((PORT + 2))"
    else
        measure sampled "$((PORT + 2))" && measure off "$PORT"
    fi
done
"$PYTHON" - "$out" "${ROUNDS:-40}" <<'PY'
import json, pathlib, random, statistics, sys

def rate(name, turn):
    measured = json.loads(pathlib.Path(sys.argv[1], f"{name}-{turn}.json").read_text())
    return measured["measurements"][0]["server"]["requests_per_second_per_core"]

turns = range(1, int(sys.argv[2]) + 1)
off, sampled = ([rate(name, turn) for turn in turns] for name in ("off", "sampled"))
ratios = [second / first for first, second in zip(off, sampled)]
draw = random.Random(7)
medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
print(f"requests/s per core: {statistics.median(off):.0f} off, {statistics.median(sampled):.0f} with 1 %")
print(f"ratio: {statistics.median(ratios):.3f} (95 %: {medians[49]:.3f} to {medians[1949]:.3f}, {len(ratios)} turns)")
PY
