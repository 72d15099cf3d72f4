#!/usr/bin/env bash
# Fits the heads of models/emoji with `imagegpt probe fit`: that of the categories,
# which is shipped, and one of the subcategories, of which only the figures are.
# Then measures the shipped head on the test split, on the model in fp32 and int8.
set -euo pipefail
cd "$(dirname "$0")/.."
imagegpt=target/release/imagegpt
classes=target/probe/classes
"$TRAIN_VENV/bin/python" models/train/data.py --classes "$classes"
layers=$(grep -oE '"n_layer": [0-9]+' models/emoji/config.json | grep -oE '[0-9]+')
fit() {
    "$imagegpt" probe fit "$classes/$1" --output "$2" --work "target/probe/$1" --alpha white \
        --context raw,sos-shifted --norm pre-attn-rms,none \
        --model models/emoji --serve "--feature-layer $layers --execution-provider cpu" \
        --log warn
}
fit category models/emoji/category.safetensors
fit subcategory target/probe/subcategory.safetensors
cp target/probe/subcategory.json models/emoji/
for precision in fp32 int8; do
    echo "the shipped head on the test split, $precision:"
    "$imagegpt" probe eval models/emoji/category.safetensors "$classes/category" --part test \
        --work "target/probe/eval-$precision" --model models/emoji --log warn \
        --serve "--precision $precision --feature-layer $layers --execution-provider cpu" |
        head -n 1
done
