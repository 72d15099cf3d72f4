#!/usr/bin/env bash
# Downloads ONNX Runtime's shared library, from its PyPI wheel at a pinned
# version and checksum, to target/onnxruntime/, where the worker looks for it.
set -euo pipefail
cd "$(dirname "$0")/.."
version=1.31.1
case $(uname -m) in
x86_64) checksum=5752bd508126ae7c49894d3b9d2e83f0c3d487319246d04c444b393308d7ad7f ;;
aarch64) checksum=da05378364c44d4407e463982d2bf8d5e4cfea873283757e48beeb41df97b7f3 ;;
*)
    echo "onnxruntime.sh: no wheel is known for $(uname -m); set ORT_DYLIB_PATH to a libonnxruntime.so" >&2
    exit 1
    ;;
esac
target=target/onnxruntime
library=libonnxruntime.so.$version
[ -f "$target/$library" ] && [ -e "$target/libonnxruntime.so" ] && exit 0
if ! python3 -m pip --version >/dev/null 2>&1; then
    echo "onnxruntime.sh: python3 has no pip; on Debian: apt-get install python3-pip" >&2
    exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The wheel is specified completely, so that the Python that runs pip does not
# matter.
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version 3.11 --implementation cp --abi cp311 \
    --platform "manylinux_2_28_$(uname -m)" --dest "$work" "onnxruntime==$version"
wheel=$(ls "$work"/*.whl)
echo "$checksum  $wheel" | sha256sum --check --quiet
python3 -m zipfile -e "$wheel" "$work/x"
mkdir -p "$target"
cp "$work/x/onnxruntime/LICENSE" "$work/x/onnxruntime/ThirdPartyNotices.txt" "$target/"
# The file gets its final name only when it is complete.
cp "$work/x/onnxruntime/capi/$library" "$target/.partial"
mv "$target/.partial" "$target/$library"
ln -sf "$library" "$target/libonnxruntime.so"
echo "onnxruntime.sh: $target/$library"
