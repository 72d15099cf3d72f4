#!/usr/bin/env bash
# Measures everything about a GPU in one go, with models of random weights: the
# engine alone against the roofline, gRPC at saturation and under open loops,
# encoded images by decoding threads, generation, CUDA graphs on and off, fp16
# and bf16 against fp32, a soak, and PyTorch in the same run where it is there.
#
# Needs the release binary, libonnxruntime and Python 3 without packages:
#
#   IMAGEGPT         the binary [target/release/imagegpt]
#   ORT_DYLIB_PATH   libonnxruntime.so of onnxruntime-gpu [as `imagegpt serve`]
#   OUT              where bench-gpu.md, results.json and log.txt go [target/bench-gpu]
#   PROVIDER         cuda or cpu [cuda]
#   SHAPES           of tiny small medium large [small medium large]
#   PRECISIONS       of fp32 fp16 bf16, and int8 on a CPU [fp32 fp16 bf16; fp32 on a CPU]
#   STEPS            of engine grpc latency generate cores graphs soak torch [all]
#   BUDGET           seconds for all of it [600]; what does not fit is left out, and the
#                    report says so. Loading may take it over by half a minute: where a
#                    command is ended after 600 s, say 540
#   SOAK             seconds of the soak [a quarter of BUDGET, 300 at most]; growth of
#                    memory a minute needs 90
#   BATCHES          batch sizes [1,2,4,8,16,32,64]
#   SLOTS            images generated at one time, at most [256]
#   CACHE            memory for their keys and values [24GiB]
#   IMAGES           folder of images for `cores` [models/pictures]
#   WORK             where models are compiled to and kept [a temporary folder]
#   SERVE_FLAGS      more flags of `imagegpt serve`
#
# A setting that cannot be used ends it with exit code 2 before any work. Begin on a quiet
# machine: one that is busy (load average over half of its cores) is noted in the report.
#
# For the five minutes of a soak that is reported: STEPS=soak SHAPES=small SOAK=300.
# Errors against fp32 need fp32 among PRECISIONS, before the others. Loading and warming
# up the largest models takes most of a minute each: give large a call of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python3 -u scripts/bench-gpu/bench.py
