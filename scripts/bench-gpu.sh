#!/usr/bin/env bash
# Measures everything about a GPU in one go, with models of random weights: the
# engine alone against the roofline, gRPC at saturation and under open loops,
# encoded images by decoding threads, generation, CUDA graphs on and off, fp16
# and bf16 against fp32, a soak, and PyTorch in the same run if it is installed.
#
# Needs the release binary, libonnxruntime and Python 3 without packages:
#
#   IMAGEGPT         the binary [target/release/imagegpt]
#   ORT_DYLIB_PATH   libonnxruntime.so of onnxruntime-gpu [as `imagegpt serve`]
#   OUT              directory for bench-gpu.md, results.json and log.txt [target/bench-gpu]
#   PROVIDER         cuda or cpu [cuda]
#   SHAPES           of tiny small medium large [small medium large]
#   PRECISIONS       of fp32 fp16 bf16, and int8 on a CPU [fp32 fp16 bf16; fp32 on a CPU]
#   STEPS            of engine grpc latency generate cores graphs soak torch [all of these]; or
#                    `run`, for a quarter of an hour on a device: answers (served, against the
#                    CPU, in every precision), nan (caches of NaN by kernel of attention), seeds
#                    (by elements per head), steps (by slots and past), primers (of new lengths),
#                    graphs, copies (--gpu-copies of both kinds, in turns), generate, two (workers
#                    on one GPU), torch, kernels (by time, where nsys or ncu is installed), fault
#                    (an illegal address), in this order. Each has a limit and a file
#                    OUT/STEP.json of its own, so that a cut loses only what comes after; use
#                    BUDGET=720
#   BUDGET           seconds for all steps [600]; the report lists steps that did not fit.
#                    Loading models may exceed it by half a minute: if the command is
#                    killed after 600 s, use 540
#   SOAK             seconds of the soak [a quarter of BUDGET, 300 at most]; growth of
#                    memory per minute needs 90
#   BATCHES          batch sizes [1,2,4,8,16,32,64]
#   SLOTS            most images that are generated at the same time [256]
#   CACHE            memory for their key/value caches [24GiB]
#   IMAGES           directory of images for `cores` [models/pictures]
#   WORK             directory in which compiled models are kept [a temporary directory]
#   SERVE_FLAGS      more flags of `imagegpt serve`
#
# A wrong setting ends the script with exit code 2 before any work. Begin on a quiet machine:
# the report notes a busy one (load average over half of its cores).
#
# For the five minutes of a soak that is reported: STEPS=soak SHAPES=small SOAK=300.
# Errors against fp32 need fp32 among PRECISIONS, before the others. Loading and warming
# up the largest models takes most of a minute each: run the script separately for large.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python3 -u scripts/bench-gpu/bench.py
