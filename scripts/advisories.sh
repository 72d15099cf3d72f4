#!/usr/bin/env bash
# Checks the dependencies against the advisories of RustSec (`make deny`). Their
# database is a git repository, which a build machine without the internet
# cannot reach: then the script says so, and `make deny` goes on.
#
# ADVISORIES names another copy of the database for the look whether it is
# there, CARGO_DENY another program.
set -euo pipefail
cd "$(dirname "$0")/.."

database=${ADVISORIES:-https://github.com/RustSec/advisory-db}
# Longest time for the database's server to answer, in seconds.
patience=30

if ! GIT_TERMINAL_PROMPT=0 timeout "$patience" git ls-remote --quiet "$database" HEAD >/dev/null 2>&1; then
    echo "advisories are NOT checked: $database cannot be reached; run \`make deny\` where it can" >&2
    exit 0
fi
exec "${CARGO_DENY:-target/tools/bin/cargo-deny}" --locked check advisories
