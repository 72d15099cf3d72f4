#!/usr/bin/env bash
# Measures the cost of the server alone: $MODEL's sizes with an engine that
# costs nothing. Prints requests per second per core at saturation (64 callers,
# one image per call, as tokens), and the latency that the server adds at half
# of saturation and at 4,000 requests per second. With two cores or more, the
# worker has one core to itself and this tool has the others, so that the
# figures per core are exact.
set -euo pipefail
cd "$(dirname "$0")/.."
worker=target/release/imagegpt
mkdir -p target/bench
log=target/bench/worker.log
# Cores that this script may run on, one per line.
cores=$(awk '$1 == "Cpus_allowed_list:" { print $2 }' /proc/self/status | tr , '\n' |
    awk -F- '{ for (core = $1; core <= $NF; core++) print core }')
first=$(head -n 1 <<<"$cores")
others=$(tail -n +2 <<<"$cores" | paste -sd ,)
on_first=() on_others=()
if [ -n "$others" ] && command -v taskset >/dev/null; then
    on_first=(taskset -c "$first") on_others=(taskset -c "$others")
    echo "the worker on core $first, the tool on $others"
else
    echo "the worker and the tool share their cores"
fi
# Without a queue delay, which is a wait on request and not a cost.
"${on_first[@]}" "$worker" serve --model "$MODEL" --fake-engine 0s --max-queue-delay 0ms \
    --listen "127.0.0.1:$PORT" --metrics-listen "127.0.0.1:$METRICS_PORT" 2>"$log" &
pid=$!
trap 'kill "$pid" 2>/dev/null || true' EXIT
scripts/await-ready.sh "$pid" "$METRICS_PORT" "$log"
bench() {
    "${on_others[@]}" "$worker" bench load --endpoint "http://127.0.0.1:$PORT" --pid "$pid" "$@"
}
bench --callers 64 --of-saturation 50 \
    --json target/bench/server.json --plot target/bench/server.svg "$@"
bench --rate 4000 "$@"
kill "$pid"
wait "$pid"
