#!/usr/bin/env bash
# Compares features of this worker on a CPU with those of its peers, each in a
# process of its own, one image at a time, in turns: the model card's recipe,
# OpenVINO, ONNX Runtime's OpenVINO provider, and PyTorch if it is asked for.
# Prints the peaks of the CPU, a table and which goals are reached, and writes
# them to bench-peers.md and results.json in target/bench-peers. A system that
# the machine cannot run becomes a row that says why. The exit code is 0 whether
# goals are reached or not, and 2 for a wrong setting, which is found before any
# work.
#
#   PEERS_VENV           has scripts/bench-peers/requirements.txt (see Makefile)
#   PEERS_OPENVINO_VENV  has scripts/bench-peers/openvino-requirements.txt, which
#                        writes the same directory as onnxruntime
#   BINARY               the program that is measured [target/release/imagegpt]
#   ROUNDS               turns of each system [5]
#   THREADS              threads of each system [2]
#   SYSTEMS              of scripts/bench-peers/systems.py [all but torch-fp32 torch-bf16]
#
# Our time includes gRPC, since the worker is driven as its clients do.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "$PEERS_VENV/bin/python" -u scripts/bench-peers/bench.py
