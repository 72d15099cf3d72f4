#!/usr/bin/env bash
# Compiles the .cu files in src/gpu/kernels/ to .ptx files beside them, with
# NVIDIA's compiler in a venv. With `check`, only compares the .ptx files with
# the compiler's output.
#   usage: scripts/kernels.sh [check]
#
# The PTX version is set back to that of CUDA 11.4, which has everything that
# the kernels use: a driver accepts no PTX version newer than its own.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$(realpath -m "${KERNELS_VENV:-target/kernels-venv}")
if [ ! -f "$venv/.done" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" --quiet --disable-pip-version-check install --no-deps \
        nvidia-cuda-nvcc==13.0.48 nvidia-nvvm==13.0.48 nvidia-cuda-crt==13.0.48 \
        nvidia-cuda-runtime==13.0.48 nvidia-cuda-cccl==13.0.85
    cuda=$(echo "$venv"/lib/python3*/site-packages/nvidia/cu13)
    # The packages keep the compiler proper where nvcc does not look for it.
    mkdir -p "$cuda/nvvm/bin"
    ln -sf "$cuda/bin/cicc" "$cuda/nvvm/bin/cicc"
    touch "$venv/.done"
fi
cuda=$(echo "$venv"/lib/python3*/site-packages/nvidia/cu13)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for source in src/gpu/kernels/*.cu; do
    name=$(basename "$source" .cu)
    "$cuda/bin/nvcc" -I"$cuda/include" -ptx -arch=compute_80 -O3 -o "$work/$name.ptx" "$source"
    sed -i 's/^\.version 9\.0$/.version 7.4/' "$work/$name.ptx"
    # Assembles the PTX as a driver would, for GPUs from the oldest to the newest.
    for gpu in sm_80 sm_90 sm_120; do
        "$cuda/bin/ptxas" -arch="$gpu" -o "$work/$name.cubin" "$work/$name.ptx"
    done
    if [ "${1:-}" = check ]; then
        cmp "$work/$name.ptx" "src/gpu/kernels/$name.ptx"
    else
        cp "$work/$name.ptx" "src/gpu/kernels/$name.ptx"
    fi
    echo "kernels: src/gpu/kernels/$name.ptx"
done
