#!/usr/bin/env bash
# Builds the repository's pages as a book in target/docs. The pages of docs/ and the
# documents beside them keep their relative places, so that links between them hold.
set -euo pipefail
cd "$(dirname "$0")/.."
pages=target/docs-pages
rm -rf "$pages"
mkdir -p "$pages"
git ls-files --cached --others --exclude-standard -- '*.md' '*.png' 'proto/**' LICENSE docs/book.toml |
    xargs cp --parents -t "$pages"
sed 's#](#](docs/#' docs/SUMMARY.md >"$pages/SUMMARY.md"
cat >>"$pages/SUMMARY.md" <<'SUMMARY'

# Repository

- [README](README.md)
- [ARCHITECTURE](ARCHITECTURE.md)
- [CHANGELOG](CHANGELOG.md)
- [CONTRIBUTING](CONTRIBUTING.md)
- [SECURITY](SECURITY.md)
- [CPU kernels: measurements](benches/ATTENTION.md)
- [GPU: measurements](benches/GPU.md)
- [Kubernetes](deploy/README.md)
  - [Runbook](deploy/RUNBOOK.md)
  - [Sizing](deploy/SIZING.md)
- [Models](models/README.md)
  - [emoji](models/emoji/README.md)
  - [pictures](models/pictures/README.md)
  - [untrained](models/untrained/README.md)
SUMMARY
mv "$pages/docs/book.toml" "$pages/book.toml"
rm "$pages/docs/SUMMARY.md"
MDBOOK_BUILD__BUILD_DIR="$PWD/target/docs" target/tools/bin/mdbook build "$pages"
