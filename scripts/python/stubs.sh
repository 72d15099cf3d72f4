#!/usr/bin/env bash
# Generates the Python messages and stubs of proto/imagegpt/v1 into the Python
# package. google.rpc.Status comes from the package googleapis-common-protos.
# PYTHON names a Python with scripts/python/requirements.txt.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=python/src
rm -rf "$target/imagegpt/v1"
"${PYTHON:-target/python/tools/bin/python}" -m grpc_tools.protoc --proto_path=proto \
    --python_out="$target" --pyi_out="$target" --grpc_python_out="$target" \
    imagegpt/v1/imagegpt.proto
# protoc makes no packages.
echo '"""Messages and stubs of the worker, generated from proto/imagegpt/v1."""' \
    >"$target/imagegpt/v1/__init__.py"
