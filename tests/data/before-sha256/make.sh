#!/usr/bin/env bash
# Makes what lies beside it, with a binary of the last version that recorded no SHA-256
# of a compiled model's files (commit 54038424), from the root of the repository:
#   tests/data/before-sha256/make.sh IMAGEGPT
# An unfinished job is a finished one without its last record: that is what a kill
# leaves. Tests say where its input is.
set -euo pipefail
imagegpt=$1
here=$(dirname "$0")
rm -rf "$here"/compiled "$here"/job-*
"$imagegpt" compile tests/data/models/micro-checkpoint --tasks embed --output "$here/compiled"
for model in compiled published; do
  folder=$here/compiled
  [ $model = compiled ] || folder=tests/data/models/micro
  job=$here/job-$model
  "$imagegpt" embed models/pictures/flags --model "$folder" --output "$job" --part-items 2
  state=$job/_imagegpt
  rm "$state/summary.json" "$state/journal/00002-00000.json" "$job/part-00002-00000.parquet"
  sed -i "s|\"name\": \"/.*\"|\"name\": \"/pictures\"|" "$state/manifest.json"
done
