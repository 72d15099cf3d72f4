"""Compares the worker's decoders with Pillow, over all files of directories.

usage: compare.py [--list OUTCOME] DIR…

PIXELS names the program that decodes (target/release/examples/pixels). Prints a table by format: files whose upright
RGB pixels are equal, files that differ (with the tokens that differ), files that only one side refuses, and files that
both refuse. --list prints the names of the files of an outcome (differ, ours-refused, pillow-refused).

Exit code 1 if a file differs.
"""

import argparse
import collections
import hashlib
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parents[2]
PIXELS = os.environ.get("PIXELS", ROOT / "target" / "release" / "examples" / "pixels")
CONFIG = ROOT / "models" / "untrained" / "preprocessor_config.json"
FORMATS = {"JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP"}
OUTCOMES = ["equal", "differ", "ours-refused", "pillow-refused", "both-refused"]


def find(directories: list[Path]) -> list[Path]:
    """All files whose content begins like one of an accepted format."""
    beginnings = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"RIFF")
    files = []
    for directory in directories:
        paths = sorted(directory.rglob("*")) if directory.is_dir() else [directory]
        for path in paths:
            if path.is_file() and (path.read_bytes()[:4].startswith(beginnings) or path.suffix.lower() == ".dib"):
                files.append(path)
    return files


def decode(path: Path) -> Image.Image:
    # From bytes, as the worker decodes: by a path, Pillow maps some TIFFs into memory and turns them in another way.
    with Image.open(io.BytesIO(path.read_bytes()), formats=sorted(FORMATS - {"MPO"})) as opened:
        picture = ImageOps.exif_transpose(opened)
        if picture.mode.startswith("I;16"):
            # The worker keeps the high byte, where Pillow clips; see tests/golden/README.md.
            picture = Image.fromarray((np.array(picture) >> 8).astype(np.uint8))
        return picture.convert("RGB")


def tokens(picture: Image.Image, clusters: np.ndarray) -> np.ndarray:
    small = np.array(picture.resize((32, 32), Image.Resampling.BILINEAR)).reshape(-1, 3)
    pixels = small / 127.5 - 1
    return np.argmin(((pixels[:, None, :] - clusters[None]) ** 2).sum(axis=2), axis=1)


def name_of(path: Path) -> str:
    head = path.read_bytes()[:12]
    for name, beginnings in {
        "JPEG": [b"\xff\xd8"],
        "PNG": [b"\x89PNG"],
        "GIF": [b"GIF8"],
        "BMP": [b"BM"],
        "TIFF": [b"II", b"MM"],
        "WEBP": [b"RIFF"],
    }.items():
        if head.startswith(tuple(beginnings)):
            return name
    return "other"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="append", default=[], choices=OUTCOMES)
    parser.add_argument("dirs", nargs="+", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = 200_000_000
    clusters = np.array(json.loads(CONFIG.read_text())["clusters"])
    files = find(arguments.dirs)
    paths = "".join(f"{path}\n" for path in files)
    run = subprocess.run([PIXELS, CONFIG], input=paths, text=True, stdout=subprocess.PIPE, check=True)
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    differing: dict[str, list[int]] = collections.defaultdict(list)
    for path, line in zip(files, run.stdout.splitlines(), strict=True):
        ours = json.loads(line)
        picture, reason = None, ""
        try:
            picture = decode(path)
        except Exception as error:  # Pillow raises many kinds.
            reason = f"{type(error).__name__}: {error}"
        if picture is None:
            outcome = "both-refused" if "error" in ours else "pillow-refused"
        elif "error" in ours:
            outcome, reason = "ours-refused", ours["error"]
        elif ours["size"] == list(picture.size) and ours["sha256"] == hashlib.sha256(picture.tobytes()).hexdigest():
            outcome = "equal"
        else:
            outcome = "differ"
            different = int((tokens(picture, clusters) != np.array(ours["tokens"])).sum())
            differing[name_of(path)].append(different)
            reason = f"{different} tokens differ; sizes {ours['size']} and {list(picture.size)}"
        counts[name_of(path)][outcome] += 1
        if outcome in arguments.list:
            print(f"{outcome}\t{path}\t{reason}")
    print("| format | files | " + " | ".join(OUTCOMES) + " | tokens that differ (mean, most) |")
    print("|---" * (len(OUTCOMES) + 3) + "|")
    for name, row in sorted(counts.items()):
        total = sum(row.values())
        tokens_row = differing[name]
        mean = f"{100 * sum(tokens_row) / (1024 * (row['equal'] + row['differ'])):.3f} %" if tokens_row else "0"
        most = f"{100 * max(tokens_row) / 1024:.1f} %" if tokens_row else "0"
        cells = [name, total, *(row[outcome] for outcome in OUTCOMES), f"{mean}, {most}"]
        print("| " + " | ".join(map(str, cells)) + " |")
    return 1 if any(row["differ"] for row in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
