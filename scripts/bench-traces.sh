#!/usr/bin/env bash
# Measures what traces cost: requests per second and core of the server alone (an
# engine that runs no model, 64 callers, one image of tokens per call), without a
# collector and with one call in a hundred sampled, in turns. Prints the figures
# of all rounds, their medians, and the second by the first.
#
#   BINARY   the program
#   PYTHON   an interpreter with grpcio and opentelemetry-proto, for the collector
#   ROUNDS   rounds (5)
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

# usage: round NAME FLAG...
round() {
    local name=$1 pid
    shift
    taskset -c 0 "$BINARY" serve --model "$MODEL" --fake-engine 0s --max-queue-delay 0ms \
        --listen "127.0.0.1:$PORT" --metrics-listen "127.0.0.1:$METRICS_PORT" "$@" \
        2>"$out/log" &
    pid=$!
    processes+=("$pid")
    scripts/await-ready.sh "$pid" "$METRICS_PORT" "$out/log"
    taskset -c 1 "$BINARY" bench saturate --endpoint "http://127.0.0.1:$PORT" --pid "$pid" \
        --callers 64 --duration 6s --warm-up 1s --json "$out/json" >"$out/text" 2>&1
    kill "$pid"
    wait "$pid"
    "$PYTHON" - "$out/json" <<'PY' | tee -a "$out/$name"
import json, sys
measured = json.load(open(sys.argv[1]))["measurements"][0]
print(round(measured["server"]["requests_per_second_per_core"]))
PY
}

for _ in $(seq "${ROUNDS:-5}"); do
    echo -n "off: " && round off
    echo -n "1 %: " && round sampled --otlp-endpoint "$collector" --otlp-sample-ratio 0.01
done
"$PYTHON" - "$out/off" "$out/sampled" <<'PY'
import statistics, sys
off, sampled = ([int(line) for line in open(path)] for path in sys.argv[1:])
first, second = statistics.median(off), statistics.median(sampled)
print(f"medians: {first:.0f} requests/s per core off, {second:.0f} with 1 % ({second / first:.3f})")
PY
