#!/bin/sh
# Builds the program, offline if /vendor has the crates (see vendor.sh).
# With `dependencies` it builds an empty program with the same dependencies.
set -eu
if [ "${1:-}" = dependencies ]; then
    # Every source file in Cargo.toml: by its path, or for benches by its name.
    sed -n -e 's/^path = "\(.*\.rs\)"/\1/p' \
        -e '/^\[\[bench\]\]/,/^$/s/^name = "\(.*\)"/benches\/\1.rs/p' Cargo.toml |
        while read -r file; do
            mkdir -p "$(dirname "$file")"
            echo 'fn main() {}' >"$file"
        done
else
    # Cargo compares modification times, and those of a checkout are older than
    # those of the empty program.
    find src -name '*.rs' -exec touch {} +
fi
set --
if [ -d /vendor/crates ]; then
    set -- --offline \
        --config 'source.crates-io.replace-with="vendored"' \
        --config 'source.vendored.directory="/vendor/crates"'
fi
exec "${CARGO:-cargo}" build --release --locked --bin imagegpt "$@"
