#!/usr/bin/env bash
# Builds the wheel of `imagegpt`: the program, stripped, and its Python client.
# Writes it to target/wheels, and checks its platform tag.
#
#   PYTHON         Python with scripts/python/requirements.txt
#   WHEEL_PROFILE  Cargo profile: release (default), demo or dev, which are
#                  built sooner, for tests
#   WHEEL_TAG      platform tag, by default that of ONNX Runtime's own wheels. A
#                  tag with a glibc that is not older than this machine's
#                  builds with its own compiler, all others with zig
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$PWD/${PYTHON:-target/python/tools/bin/python}
tag=${WHEEL_TAG:-manylinux_2_28}
profile=${WHEEL_PROFILE:-release}

scripts/python/stubs.sh
# maturin looks for zig in the Python that comes first.
PATH=$(dirname "$python"):$PATH
export PATH
here=$(ldd --version | sed -n '1s/.* //p')
linker=(--zig)
if [ "$(printf '%s\n' "${here/./_}" "${tag#manylinux_}" | sort -V | head -n 1)" = "${here/./_}" ]; then
    linker=()
fi
mkdir -p target/wheels
rm -f target/wheels/imagegpt-*.whl
(cd python && maturin build --locked --profile "$profile" "${linker[@]}" --compatibility "$tag" --out ../target/wheels)
wheel=$(ls target/wheels/imagegpt-*.whl)
# The tag that the program's symbols allow.
shown=$(auditwheel show "$wheel")
if ! grep --quiet --fixed-strings "\"${tag}_$(uname -m)\"" <<<"$shown"; then
    echo "wheel.sh: $wheel is not for ${tag}_$(uname -m):" >&2
    echo "$shown" >&2
    exit 1
fi
echo "wheel.sh: $wheel"
