#!/usr/bin/env bash
# Compares compiled graphs with the model card's recipe, on imagegpt-small's
# architecture with random weights: images per second and ratios, interleaved in
# one process. ROUNDS, THREADS, BATCH and RESIDENCE are variables of
# benches/graphs.rs.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PARITY_VENV/bin/python
work=target/bench-graphs
mkdir -p "$work"
if [ ! -f "$work/recipe.onnx" ]; then
    "$python" tests/parity/card_recipe.py --random-small "$work/small"
    "$python" tests/parity/card_recipe.py "$work/small" "$work/recipe.onnx"
fi
for precision in fp32 int8; do
    rm -rf "$work/$precision"
    target/release/imagegpt compile "$work/small" --output "$work/$precision" \
        --precision "$precision" --tasks embed,hidden
done
cargo bench --locked --bench graphs -- "$PWD/$work/recipe.onnx" "$PWD/$work/fp32" "$PWD/$work/int8"
