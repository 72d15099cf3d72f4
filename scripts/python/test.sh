#!/usr/bin/env bash
# Installs the wheel into an empty environment, as a user does, and runs the
# tests of the Python package there: the client, its adapters for scikit-learn
# and datasets, and the program. With --engines: those with Ray and Spark.
# More arguments go to pytest.
#
#   WHEEL  the wheel; by default the one in target/wheels
#   VENV   the environment, which is made again each time
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
extras=cpu,scikit-learn,datasets
# Tests of the sources, which have no wheel, are in scripts/python/check.sh.
marks='not engines'
files=("$root/python/tests")
if [ "${1:-}" = --engines ]; then
    shift
    extras=cpu,ray,spark
    marks=engines
    # The others import what this environment does not have.
    files=("$root"/python/tests/test_{arrow,ray,spark}.py)
fi
wheel=${WHEEL:-$(ls target/wheels/imagegpt-*.whl)}
[ -f "$wheel" ] || { echo "test.sh: $wheel is no file: make wheel" >&2 && exit 1; }
wheel=$(realpath "$wheel")
venv=$root/${VENV:-target/python/test}

rm -rf "$venv"
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check \
    "imagegpt[$extras] @ file://$wheel" --requirement python/tests/requirements.txt

# As after `source VENV/bin/activate`, in a directory from which no source can be
# imported. No library but that of the environment counts.
export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv" IMAGEGPT_WHEEL="$wheel"
unset ORT_DYLIB_PATH IMAGEGPT_BINARY PYTHONPATH
version=$(sed -n '0,/^version = /s/^version = "\(.*\)"/\1/p' Cargo.toml)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
program=$(imagegpt --version)
package=$(python -c 'import importlib.metadata; print(importlib.metadata.version("imagegpt"))')
if [ "$program" != "imagegpt $version" ] || [ "$package" != "$version" ]; then
    echo "test.sh: Cargo.toml has $version, the program says '$program', the package '$package'" >&2
    exit 1
fi
python -m pytest "${files[@]}" -p no:cacheprovider -m "$marks" "$@"
