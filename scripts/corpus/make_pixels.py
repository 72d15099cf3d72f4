"""Writes tests/golden/pixels.json: what Pillow makes of each file in tests/golden/pixels.

usage: make_pixels.py

For each file its size and the SHA-256 of its upright RGB pixels, or null where Pillow refuses the file.
"""

import hashlib
import json
import warnings

from compare import ROOT, decode

FOLDER = ROOT / "tests" / "golden"


def main() -> None:
    warnings.simplefilter("ignore")
    rows = []
    for path in sorted((FOLDER / "pixels").iterdir()):
        try:
            picture = decode(path)
        except Exception:  # Pillow raises many kinds.
            rows.append({"file": path.name, "size": None, "rgb_sha256": None})
            continue
        digest = hashlib.sha256(picture.tobytes()).hexdigest()
        rows.append({"file": path.name, "size": list(picture.size), "rgb_sha256": digest})
    (FOLDER / "pixels.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(f"{len(rows)} files, {sum(row['size'] is None for row in rows)} refused")


if __name__ == "__main__":
    main()
