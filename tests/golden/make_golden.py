"""Makes the answers of tests/golden from its pictures, with Pillow and transformers.

    python tests/golden/make_golden.py

golden.json and tokens.bin: tokens of every picture in images/.
resize.json and resize.bin: Pillow's bilinear filter alone.
ties.json: colors that are equally near to several palette entries.
README.md there describes the fields. Same versions as models/requirements.txt.
"""

import hashlib
import json
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb
from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

FOLDER = Path(__file__).resolve().parent
MODEL = FOLDER.parents[1] / "models" / "untrained"
CROP = 224
RESIZES = [
    # (width, height) to (width, height)
    ((1, 1), (32, 32)),
    ((1, 500), (32, 32)),
    ((500, 1), (32, 32)),
    ((31, 33), (32, 32)),
    ((32, 32), (32, 32)),
    ((33, 31), (32, 32)),
    ((32, 48), (32, 32)),
    ((48, 32), (32, 32)),
    ((64, 64), (32, 32)),
    ((100, 7), (32, 32)),
    ((7, 100), (32, 32)),
    ((131, 97), (32, 32)),
    ((16, 12), (61, 45)),
    ((9, 9), (8, 8)),
    ((5, 3), (1, 1)),
    ((128, 128), (32, 32)),
    ((40, 30), (74, 56)),
]


def write_rows(path: Path, rows: list[dict]) -> None:
    """One row a line, so that a changed row shows as one."""
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def upright(path: Path) -> Image.Image:
    picture = ImageOps.exif_transpose(Image.open(path))
    if picture.mode.startswith("I;16"):
        # Our one deliberate difference: Pillow's convert clips 16-bit gray at
        # 255, which turns nearly all of it white. Keep the high byte instead,
        # as Pillow itself does with 16-bit color.
        picture = Image.fromarray((np.array(picture) >> 8).astype(np.uint8))
    return picture


def to_rgb(picture: Image.Image, alpha: str) -> Image.Image:
    if alpha == "DROP":
        return picture.convert("RGB")
    return Image.fromarray(convert_to_rgb(picture, return_numpy=True))


def center_crop(picture: Image.Image) -> Image.Image:
    """torchvision's Resize(224) and CenterCrop(224), by Pillow."""
    width, height = picture.size
    if width <= height:
        size = (CROP, int(CROP * height / width))
    else:
        size = (int(CROP * width / height), CROP)
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    left = int(round((size[0] - CROP) / 2.0))
    top = int(round((size[1] - CROP) / 2.0))
    return picture.crop((left, top, left + CROP, top + CROP))


def make_golden() -> None:
    processor = ImageGPTImageProcessorPil.from_pretrained(MODEL)
    rows = []
    tokens = bytearray()
    for path in sorted((FOLDER / "images").iterdir()):
        opened = Image.open(path)
        picture = upright(path)
        by_picture = {}
        for alpha in ("DROP", "WHITE"):
            rgb = to_rgb(picture, alpha)
            digest = hashlib.sha256(rgb.tobytes()).hexdigest()
            for fit in ("SQUASH", "CENTER_CROP"):
                key = (digest, fit)
                if key not in by_picture:
                    fitted = rgb if fit == "SQUASH" else center_crop(rgb)
                    (ids,) = processor(fitted, return_tensors="np")["input_ids"]
                    assert ids.shape == (1024,)
                    by_picture[key] = ids.astype("<u2").tobytes()
                rows.append(
                    {
                        "file": path.name,
                        "mode": opened.mode,
                        "size": list(rgb.size),
                        "format": opened.format,
                        "fit": fit,
                        "alpha": alpha,
                        "rgb_sha256": digest,
                        "tokens_offset": len(tokens) // 2,
                    }
                )
                tokens += by_picture[key]
    write_rows(FOLDER / "golden.json", rows)
    (FOLDER / "tokens.bin").write_bytes(tokens)
    print(f"golden: {len(rows)} cases")


def make_resizes() -> None:
    random = np.random.RandomState(7)
    rows = []
    data = bytearray()
    for source, target in RESIZES:
        pixels = random.randint(0, 256, (source[1], source[0], 3)).astype(np.uint8)
        result = Image.fromarray(pixels).resize(target, Image.Resampling.BILINEAR)
        row = {"from": list(source), "to": list(target), "input_offset": len(data)}
        data += pixels.tobytes()
        row["output_offset"] = len(data)
        data += result.tobytes()
        rows.append(row)
    write_rows(FOLDER / "resize.json", rows)
    (FOLDER / "resize.bin").write_bytes(data)
    print(f"resize: {len(rows)} cases")


def make_ties() -> None:
    """A palette whose centers lie on 8-bit levels, where ties are possible."""
    clusters = np.array(json.loads((MODEL / "preprocessor_config.json").read_text())["clusters"])
    palette = np.rint(127.5 * (clusters + 1)).astype(np.int64)
    # A palette may name a color twice.
    palette[-4:] = palette[[3, 77, 200, 401]]
    random = np.random.RandomState(11)
    ties = []
    plain = []
    candidates = [palette[i] for i in (3, 77, 200, 401)]
    candidates += list(random.randint(0, 256, (60_000, 3)))
    for color in candidates:
        # In units of one level all of it is whole numbers, so ties are exact.
        distances = ((palette - color) ** 2).sum(axis=1)
        tied = np.flatnonzero(distances == distances.min())
        if len(tied) > 1 and len(ties) < 50:
            ties.append(tie_row(color, tied, palette))
        elif len(tied) == 1 and len(plain) < 10:
            plain.append(tie_row(color, tied, palette))
    values = {
        "levels": palette.tolist(),
        "clusters": (palette / 127.5 - 1).tolist(),
        "cases": ties + plain,
    }
    parts = []
    for key, rows in values.items():
        lines = ",\n".join("    " + json.dumps(row) for row in rows)
        parts.append(f'  "{key}": [\n{lines}\n  ]')
    (FOLDER / "ties.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")
    agree = sum(row["token"] == row["f64"] for row in ties)
    print(f"ties: {len(ties)}, plain f64 agrees on {agree}; {len(plain)} without a tie")


def tie_row(color: np.ndarray, tied: np.ndarray, palette: np.ndarray) -> dict:
    exact = [
        sum((Fraction(2 * int(a), 255) - Fraction(2 * int(b), 255)) ** 2 for a, b in zip(color, center))
        for center in palette
    ]
    token = exact.index(min(exact))
    assert token == tied[0]
    x = color / 127.5 - 1
    difference = x - (palette / 127.5 - 1)
    red, green, blue = (difference**2).T
    return {
        "color": color.tolist(),
        "token": token,
        "tied": tied.tolist(),
        "f64": int(np.argmin((red + green) + blue)),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    make_golden()
    make_resizes()
    make_ties()


if __name__ == "__main__":
    main()
