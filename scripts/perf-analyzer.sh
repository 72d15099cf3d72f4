#!/usr/bin/env bash
# Runs perf_analyzer against a running worker: scripts/perf-analyzer.sh ENDPOINT
# MODEL. Triton's load tool is part of tritonclient's wheel up to 2.41. It also
# needs a CUDA runtime (even without a GPU) and libb64. If it cannot run, the
# script says so.
set -euo pipefail
cd "$(dirname "$0")/.."
endpoint=$1
model=$2
tools=$INTEROP_VENV/perf
out=target/interop
if [ ! -x "$tools/bin/perf_analyzer" ]; then
    "$INTEROP_VENV/bin/pip" install --quiet --disable-pip-version-check --no-deps \
        --target "$tools" tritonclient==2.41.1 nvidia-cuda-runtime-cu12==12.9.79
fi
if [ ! -e "$tools/lib/libb64.so.0d" ]; then
    mkdir -p "$tools/lib"
    if (cd "$tools/lib" && apt-get download libb64-0d 2>/dev/null && dpkg -x libb64-0d_*.deb .); then
        cp "$tools"/lib/usr/lib/*/libb64.so.0d "$tools/lib/"
    fi
fi
export LD_LIBRARY_PATH=$tools/lib:$tools/nvidia/cuda_runtime/lib
if ! "$tools/bin/perf_analyzer" --version >/dev/null 2>&1 &&
    ldd "$tools/bin/perf_analyzer" | grep -q 'not found'; then
    echo "perf_analyzer cannot be run here: $(ldd "$tools/bin/perf_analyzer" | grep 'not found' | xargs)"
    exit 0
fi
"$INTEROP_VENV/bin/python" - "$out/perf.json" <<'PY'
import json, random, sys
pixels = [random.Random(n).choices(range(256), k=32 * 32 * 3) for n in range(8)]
data = [{"pixels": {"content": image, "shape": [32, 32, 3]}} for image in pixels]
json.dump({"data": data}, open(sys.argv[1], "w"))
PY
for mode in "" --streaming; do
    "$tools/bin/perf_analyzer" -m "$model" -u "$endpoint" -i grpc $mode -b 1 \
        --input-data "$out/perf.json" --concurrency-range 8 --percentile 99 -p 2000 -s 50 -r 3 \
        ${mode:+--async} >"$out/perf.log" 2>&1 || { cat "$out/perf.log"; exit 1; }
    grep -E '^ +(Inference count|Execution count|Successful request count|Throughput|Avg request|p99 latency)' "$out/perf.log" |
        sed "s/^ */perf_analyzer ${mode:-unary}: /"
done
