#!/usr/bin/env bash
# Compiles models/emoji once and serves it with its head. Embeds, classifies and
# tokenizes the pictures in models/pictures over gRPC, and prints and draws the
# nearest neighbors of each; scores some of the pictures, and completes the
# upper halves of others; then ends the worker. The model was trained on none of
# these pictures.
set -euo pipefail
cd "$(dirname "$0")/.."
worker=target/demo/imagegpt
pictures=target/demo-pictures
mkdir -p "$pictures"
log=$pictures/worker.log
"$worker" serve --model models/emoji --feature-layer 8 --model-name emoji --cache-dir target/demo-pictures/models \
    --execution-provider cpu --head category=models/emoji/category.safetensors \
    --listen "127.0.0.1:$PORT" --metrics-listen "127.0.0.1:$METRICS_PORT" 2>"$log" &
pid=$!
trap 'kill "$pid" 2>/dev/null || true' EXIT
scripts/await-ready.sh "$pid" "$METRICS_PORT" "$log"
export IMAGEGPT_ENDPOINT="http://127.0.0.1:$PORT"
"$worker" neighbors models/pictures --alpha white --head category --picture "$pictures/neighbors.png"
echo
"$worker" score models/pictures/flags models/pictures/food-drink --alpha white --complexity --sort \
    --map "$pictures/maps"
echo
inputs=()
for picture in animals-nature/rooster flags/rainbow-flag food-drink/cherries food-drink/bread \
    objects/shirt smileys-emotion/flushed travel-places/snowman-without-snow people-body/haircut; do
    inputs+=(--input "models/pictures/$picture.png")
done
"$worker" generate "${inputs[@]}" --alpha white --samples 8 --seed 1 \
    --output "$pictures/completions.png" | tail -n 1
kill "$pid"
wait "$pid"
trap - EXIT
cat <<MESSAGE

Look at:
  $pictures/completions.png   input as the model sees it, the half that is kept, eight completions
  $pictures/neighbors.png     each picture, its tokens, and its nearest neighbors
  $pictures/maps              where the model finds a picture unlikely

To try it in a browser, with pictures of your own:
  make demo-page                 serves http://127.0.0.1:$PORT/ until Ctrl-C

Type next:
  export PATH="\$PWD/target/demo:\$PATH"
  imagegpt serve --model models/emoji --feature-layer 8 --head category=models/emoji/category.safetensors
and, when it has logged "ready", in another terminal after the same export:
  imagegpt classify models/pictures/food-drink --head category --alpha white
  imagegpt generate --alpha white --samples 4 --output target/new.png
README.md says how to call the worker from Python, embed a dataset and train a linear probe.
MESSAGE
