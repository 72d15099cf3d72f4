#!/usr/bin/env bash
# Compares generation through gRPC with transformers (with key/value cache) and
# with the bare decode graph, on imagegpt-small's architecture with random
# weights. ROUNDS, THREADS, SEQUENCES and PRECISIONS are variables of
# tests/parity/bench_generate.py.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PARITY_VENV/bin/python
work=target/bench-generate
mkdir -p "$work"
[ -d "$work/small" ] || "$python" tests/parity/card_recipe.py --random-small "$work/small"
for precision in ${PRECISIONS:-fp32 int8}; do
    rm -rf "$work/$precision"
    target/release/imagegpt compile "$work/small" --output "$work/$precision" \
        --precision "$precision" --tasks score,generate >/dev/null
done
"$python" tests/parity/bench_generate.py target/release/imagegpt "$work"
