#!/usr/bin/env bash
# Runs the tests of the Python package from its sources, without a wheel.
# With --setup: makes the environment for that. More arguments go to pytest.
#
#   BINARY  the program
#   VENV    the environment
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
venv=$root/${VENV:-target/python/check}
if [ "${1:-}" = --setup ]; then
    python3 -m venv "$venv"
    # What python/pyproject.toml names, without the package itself.
    "$venv/bin/python" - >"$venv/requirements.txt" <<'PY'
import tomllib
with open("python/pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
needed = project["dependencies"] + [
    line for extra in ("cpu", "scikit-learn", "datasets") for line in extras[extra]
]
print("\n".join(needed))
PY
    "$venv/bin/pip" install --quiet --disable-pip-version-check \
        --requirement "$venv/requirements.txt" --requirement python/tests/requirements.txt
    exit
fi
binary=$(realpath "$BINARY")
[ -x "$binary" ] || { echo "check.sh: $binary is no program: cargo build" >&2 && exit 1; }
export PATH="$venv/bin:$PATH" PYTHONPATH="$root/python/src" IMAGEGPT_BINARY="$binary"
python -m pytest python/tests -p no:cacheprovider \
    -m "not engines and not wheel and not slow" "$@"
