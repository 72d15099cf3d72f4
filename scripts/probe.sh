#!/usr/bin/env bash
# Fits the heads of models/emoji with `imagegpt probe fit`: that of the categories,
# which is shipped, and one of the subcategories, of which only the figures are.
# Then measures the shipped head on the test split, on the model in fp32 and int8.
#
#   BINARY       the program [target/release/imagegpt]
#   MODEL        the model's directory, into which the head is written [models/emoji]
#   WORK         directory of the classes and of features [target/probe]
#   TRAIN_VENV   the environment of models/train
set -euo pipefail
cd "$(dirname "$0")/.."
imagegpt=${BINARY:-target/release/imagegpt}
model=${MODEL:-models/emoji}
work=${WORK:-target/probe}
classes=$work/classes
"$TRAIN_VENV/bin/python" models/train/data.py --classes "$classes"
layers=$(grep -oE '"n_layer": [0-9]+' "$model/config.json" | grep -oE '[0-9]+')
fit() {
    "$imagegpt" probe fit "$classes/$1" --output "$2" --work "$work/$1" --alpha white \
        --context raw,sos-shifted --norm pre-attn-rms,none \
        --model "$model" --serve "--feature-layer $layers --execution-provider cpu" \
        --log warn
}
fit category "$model/category.safetensors"
fit subcategory "$work/subcategory.safetensors"
cp "$work/subcategory.json" "$model/"
for precision in fp32 int8; do
    echo "the shipped head on the test split, $precision:"
    "$imagegpt" probe eval "$model/category.safetensors" "$classes/category" --part test \
        --work "$work/eval-$precision" --model "$model" --log warn \
        --serve "--precision $precision --feature-layer $layers --execution-provider cpu" |
        head -n 1
done
