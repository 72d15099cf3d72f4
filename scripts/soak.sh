#!/usr/bin/env bash
# Soaks a worker: for ten minutes (or SECONDS_EACH), two callers, each with its own
# token and name, send mixed load at the same time (calls that end, are cancelled,
# hold garbage or come late; streams), and every answer is verified. The worker logs
# every call. In the middle nobody reads its log, then nobody is left to read it.
# Fails if an answer was wrong, lost or doubled, if the worker's memory, threads or
# open files grew, or if no log line was dropped (the log was no test then).
# Further arguments go to both clients.
set -euo pipefail
cd "$(dirname "$0")/.."
worker=${BINARY:-target/release/imagegpt}
duration=${SECONDS_EACH:-600}
mkdir -p target/bench
log=target/bench/soak.log
dir=$(mktemp -d)
processes=()
trap 'kill "${processes[@]}" 2>/dev/null || true; rm -rf "$dir"' EXIT

for name in first second; do
    head -c 24 /dev/urandom | base64 | tr -d '/+=' >"$dir/$name"
    echo "$name $(cat "$dir/$name")" >>"$dir/tokens"
done
mkfifo "$dir/log"
cat "$dir/log" >"$log" &
reader=$!
processes+=("$reader")
"$worker" serve --model "$MODEL" --fake-engine 5ms+1ms --max-queue-delay 0ms \
    --images-in-flight-max 256 --images-per-call-max 64 \
    --auth-tokens-file "$dir/tokens" --access-log --log info,imagegpt=debug \
    --listen "127.0.0.1:$PORT" --metrics-listen "127.0.0.1:$METRICS_PORT" 2>"$dir/log" &
pid=$!
processes+=("$pid")
scripts/await-ready.sh "$pid" "$METRICS_PORT" "$log"

clients=()
for name in first second; do
    "$worker" bench soak --endpoint "http://127.0.0.1:$PORT" --pid "$pid" \
        --token-file "$dir/$name" --duration "${duration}s" --json "target/bench/soak-$name.json" \
        "$@" >"target/bench/soak-$name.txt" 2>&1 &
    clients+=($!)
done
processes+=("${clients[@]}")
sleep "$((duration * 2 / 5))"
kill -STOP "$reader"
sleep "$((duration / 5))"
kill -KILL "$reader"
wait "$reader" 2>/dev/null || true
failed=0
for client in "${clients[@]}"; do
    wait "$client" || failed=1
done
cat target/bench/soak-first.txt target/bench/soak-second.txt
page=$(curl --silent --fail "http://127.0.0.1:$METRICS_PORT/metrics")
grep -E '^imagegpt_(log_lines_dropped_total|images_in_flight|bytes_in_flight) ' <<<"$page"
grep -E '^imagegpt_requests_total\{.*code="OK",caller="(first|second)"' <<<"$page" || true
grep -qE '^imagegpt_log_lines_dropped_total [1-9]' <<<"$page" || {
    echo "soak.sh: no log line was dropped" >&2
    failed=1
}
kill "$pid"
wait "$pid"
exit "$failed"
