#!/bin/sh
# Builds the program; offline where /vendor has the crates (see vendor.sh).
# With `dependencies`, builds an empty program with the same dependencies.
set -eu
if [ "${1:-}" = dependencies ]; then
    # All files that Cargo.toml names.
    mkdir -p src benches tests/it tests/golden
    touch src/lib.rs
    for file in src/main.rs benches/preprocess.rs benches/overhead.rs benches/graphs.rs benches/attention.rs \
        tests/it/main.rs tests/golden/main.rs; do
        echo 'fn main() {}' >"$file"
    done
else
    # cargo goes by times, and those of a checkout are older than the empty
    # program's.
    find src -name '*.rs' -exec touch {} +
fi
set --
if [ -d /vendor/crates ]; then
    set -- --offline \
        --config 'source.crates-io.replace-with="vendored"' \
        --config 'source.vendored.directory="/vendor/crates"'
fi
exec cargo build --release --locked --bin imagegpt "$@"
