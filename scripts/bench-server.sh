#!/usr/bin/env bash
# Prices the server alone: $MODEL's sizes with an engine that costs nothing.
# Prints requests a second a core at saturation (64 callers, one image a call,
# as tokens), the latency that the server adds at half of that, and at 4,000
# requests a second. Where there are two cores or more the worker has one to
# itself and this tool the others, so that a core is what it says.
set -euo pipefail
cd "$(dirname "$0")/.."
worker=target/release/imagegpt
mkdir -p target/bench
log=target/bench/worker.log
# Those that this script may run on, one a line.
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
# Without a queue delay: it is a wait that is asked for, not a cost.
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
