#!/usr/bin/env bash
# Downloads everything that an image needs besides its base images, for a build
# without a network: crates by Cargo.lock, and wheels with pinned versions and
# checksums.
#
#   vendor.sh DIR [cuda]
set -euo pipefail
folder=$(realpath -m "$1")
cd "$(dirname "$0")/../.."
mkdir -p "$folder/wheels"
cargo vendor --quiet --locked --versioned-dirs "$folder/crates" >/dev/null 2>&1
download() {
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version 3.11 --implementation cp --abi cp311 --abi none \
        --platform "manylinux_2_28_$(uname -m)" --platform "manylinux_2_27_$(uname -m)" \
        --platform "manylinux2014_$(uname -m)" --dest "$folder/wheels" "$@"
}
download "onnxruntime==$(sed -n 's/^version=//p' scripts/onnxruntime.sh)"
if [ "${2:-}" = cuda ]; then
    download --require-hashes --requirement deploy/images/cuda-requirements.txt
fi
echo "vendor.sh: $folder: $(ls "$folder/crates" | wc -l) crates, $(ls "$folder/wheels" | wc -l) wheels"
