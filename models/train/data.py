"""Brings the emoji, splits them and makes the palette.

    data.py             # brings the pictures (npm), checks the splits
    data.py --palette   # makes models/emoji/preprocessor_config.json as well
    data.py --pictures  # makes models/pictures out of the test split as well
    data.py --prepared FILE.npz  # writes what a training needs, for a machine without network

The pictures are the 64x64 Noto emoji of npm's emoji-datasource-google 16.0.0
(Apache-2.0). They go to target/emoji, and nothing of them but the palette and
the demo's pictures enters the repository.
"""

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "target" / "emoji"
MODEL = ROOT / "models" / "emoji"
PICTURES = ROOT / "models" / "pictures"

PACKAGE = "emoji-datasource-google@16.0.0"
ARCHIVE = "emoji-datasource-google-16.0.0.tgz"
ARCHIVE_SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"

SEED = 20
SIDE = 32
N_COLORS = 512
SPLITS = ("train", "validation", "test")
# Shares of each subcategory. A fifth for the test keeps the standard error of
# an accuracy near 2 points.
SHARES = {"test": 0.20, "validation": 0.12}

# What a subcategory needs to be a class of a probe.
SUBCATEGORY_TRAIN_MIN = 15
SUBCATEGORY_TEST_MIN = 4

# A mirrored picture of these is another thing or none at all: writing, hands of
# clocks, phases of the moon, directions.
NO_FLIP_CATEGORIES = {"Flags", "Symbols", "Component"}
NO_FLIP_SUBCATEGORIES = {
    "award-medal",
    "book-paper",
    "computer",
    "emotion",
    "mail",
    "money",
    "music",
    "office",
    "place-map",
    "sky & weather",
    "time",
    "writing",
}
NO_FLIP_WORDS = ("LEFT", "RIGHT", "FACING", "CALENDAR", "SIGN", "BULLET", "ATM", "CLOCK")

# Code points that name who does a thing and not what is done. Emoji that differ
# in nothing else look alike, so they share a split.
PERSONS = {"1f468": "1f9d1", "1f469": "1f9d1", "1f474": "1f9d3", "1f475": "1f9d3", "1f466": "1f9d2", "1f467": "1f9d2"}
PERSON_MARKS = {"2640", "2642", "27a1", "200d", "fe0f"}
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}


@dataclass(frozen=True)
class Emoji:
    """One base emoji with the pictures of its skin tones."""

    name: str
    short_name: str
    category: str
    subcategory: str
    split: str
    # The first emoji that it must share a split with.
    group: int
    flips: bool
    # RGBA, 64x64: the base first, then its skin tones.
    pictures: tuple[Image.Image, ...]
    files: tuple[str, ...]
    # The base's file as it came.
    png: bytes


def bring() -> Path:
    """The package's archive, with the right checksum."""
    archive = CACHE / ARCHIVE
    if not archive.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=CACHE, check=True)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != ARCHIVE_SHA256:
        raise SystemExit(f"{archive} has SHA-256 {digest}, not {ARCHIVE_SHA256}: remove it and try again")
    return archive


def write_prepared(emoji: list[Emoji], path: Path) -> None:
    """One file of the training and validation splits, without the test split."""
    chosen = [one for one in emoji if one.split != "test"]
    facts = [
        {key: value for key, value in vars(one).items() if key not in ("pictures", "png")} for one in chosen
    ]
    # PNGs are smaller than pixels in any archive, and read back to the same pixels.
    files = [encoded(picture) for one in chosen for picture in one.pictures]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(
        partial,
        facts=np.frombuffer(json.dumps(facts).encode(), np.uint8),
        sizes=np.array([len(content) for content in files]),
        pngs=np.frombuffer(b"".join(files), np.uint8),
    )
    partial.rename(path)
    print(f"wrote {len(files)} pictures of {len(chosen)} emoji to {path}: {path.stat().st_size / 1e6:.1f} MB")


def encoded(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return content.getvalue()


def load_prepared(path: Path) -> list[Emoji]:
    """The emoji that `write_prepared` wrote, in their order."""
    with np.load(path, allow_pickle=False) as stored:
        facts = json.loads(stored["facts"].tobytes())
        content, ends = stored["pngs"].tobytes(), np.cumsum(stored["sizes"]).tolist()
    files = iter([content[start:end] for start, end in zip([0, *ends], ends, strict=False)])
    emoji = []
    for one in facts:
        pngs = [next(files) for _ in one["files"]]
        pictures = tuple(Image.open(io.BytesIO(png)).convert("RGBA") for png in pngs)
        emoji.append(Emoji(**one | {"files": tuple(one["files"])}, pictures=pictures, png=pngs[0]))
    assert next(files, None) is None, f"{path} has more pictures than names"
    assert all(one.split in ("train", "validation") for one in emoji), f"{path} has another split"
    return emoji


def load() -> list[Emoji]:
    """All base emoji in the order of their code points, each with its split."""
    files = {}
    with tarfile.open(bring()) as archive:
        for member in archive:
            if member.name == "package/emoji.json":
                entries = json.load(archive.extractfile(member))
            elif member.name.startswith("package/img/google/64/") and member.name.endswith(".png"):
                files[Path(member.name).name] = archive.extractfile(member).read()
    entries.sort(key=lambda entry: entry["unified"])
    groups = group(entries, files)
    splits = split(entries, groups)
    emoji = []
    for entry, chosen, first in zip(entries, splits, groups, strict=True):
        names = [entry["image"], *(tone["image"] for tone in entry.get("skin_variations", {}).values())]
        pictures = tuple(Image.open(io.BytesIO(files[name])).convert("RGBA") for name in names)
        emoji.append(
            Emoji(
                name=entry["name"],
                short_name=entry["short_name"],
                category=entry["category"],
                subcategory=entry["subcategory"],
                split=chosen,
                group=first,
                flips=flips(entry),
                pictures=pictures,
                files=tuple(names),
                png=files[names[0]],
            )
        )
    check(emoji, groups)
    return emoji


def flips(entry: dict) -> bool:
    return (
        entry["category"] not in NO_FLIP_CATEGORIES
        and entry["subcategory"] not in NO_FLIP_SUBCATEGORIES
        and not any(word in entry["name"] for word in NO_FLIP_WORDS)
    )


def group(entries: list[dict], files: dict[str, bytes]) -> list[int]:
    """For each emoji the first one that it must share a split with.

    They share when they differ only in who is shown, or when a picture is the
    same down to the last pixel: several islands fly another country's flag.
    """
    first = list(range(len(entries)))

    def root(idx: int) -> int:
        while first[idx] != idx:
            idx = first[idx]
        return idx

    seen: dict[object, int] = {}
    for idx, entry in enumerate(entries):
        pixels = Image.open(io.BytesIO(files[entry["image"]])).convert("RGBA").tobytes()
        for key in (person_key(entry["unified"]), pixels):
            other = seen.setdefault(key, idx)
            a, b = sorted((root(idx), root(other)))
            first[b] = a
    return [root(idx) for idx in range(len(entries))]


def person_key(unified: str) -> tuple[str, ...]:
    points = unified.lower().split("-")
    kept = [PERSONS.get(point, point) for point in points if point not in PERSON_MARKS | SKIN_TONES]
    return tuple(kept)


def split(entries: list[dict], groups: list[int]) -> list[str]:
    """A split for each emoji, by groups, with the shares of every subcategory.

    Shares are met over whole subcategories: each group, in an order that the
    seed shuffles, goes to the split that is furthest behind its share.
    """
    # RandomState, because numpy promises that its streams never change.
    random = np.random.RandomState(SEED)
    members: dict[int, list[int]] = {}
    for idx, first in enumerate(groups):
        members.setdefault(first, []).append(idx)
    by_subcategory: dict[str, list[int]] = {}
    for first in members:
        by_subcategory.setdefault(entries[first]["subcategory"], []).append(first)
    chosen = ["train"] * len(entries)
    for subcategory in sorted(by_subcategory):
        firsts = by_subcategory[subcategory]
        n_left = {"test": 0.0, "validation": 0.0}
        total = sum(len(members[first]) for first in firsts)
        for name, share in SHARES.items():
            # A random part of one more, so that small subcategories are not
            # always rounded the same way.
            n_left[name] = np.floor(share * total + random.random_sample())
        for first in (firsts[idx] for idx in random.permutation(len(firsts))):
            for name in n_left:
                if len(members[first]) <= n_left[name]:
                    n_left[name] -= len(members[first])
                    for idx in members[first]:
                        chosen[idx] = name
                    break
    return chosen


def check(emoji: list[Emoji], groups: list[int]) -> None:
    """What must hold of the splits, whatever becomes of the code above."""
    assert len(emoji) == 1911, len(emoji)
    assert sum(len(one.pictures) for one in emoji) == 3786
    for one, first in zip(emoji, groups, strict=True):
        assert one.split == emoji[first].split, f"{one.name} left its group"
    # A file belongs to one emoji, so no skin tone is in two splits; and no two
    # base pictures that are the same are.
    owner: dict[object, str] = {}
    for one in emoji:
        for file in one.files:
            assert file not in owner, f"{file} belongs to two emoji"
            owner[file] = one.split
        pixels = one.pictures[0].tobytes()
        assert owner.setdefault(pixels, one.split) == one.split, f"{one.name}'s picture is in two splits"
    # Component is five swatches of skin; every other category is everywhere.
    for category in {one.category for one in emoji} - {"Component"}:
        for name in SPLITS:
            n = sum(one.category == category and one.split == name for one in emoji)
            assert n > 0, f"no {category} in {name}"


def on_white(picture: Image.Image) -> Image.Image:
    """As the worker composites with ALPHA_WHITE."""
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def to_pixels(picture: Image.Image, side: int = SIDE) -> np.ndarray:
    """As the worker's default fit: straight to 32x32."""
    return np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR))


def plain(picture: Image.Image, side: int = SIDE) -> np.ndarray:
    return to_pixels(on_white(picture), side)


def augment(one: Emoji, random: np.random.Generator, soft_share: float = 0.4, side: int = SIDE) -> np.ndarray:
    """A random view: skin tone, mirror, place, size, and white or a soft ground."""
    picture = one.pictures[0]
    if len(one.pictures) > 1 and random.random() < 0.5:
        picture = one.pictures[random.integers(1, len(one.pictures))]
    if one.flips and random.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # Twice the size around, so that the window may leave the picture.
    canvas = Image.new("RGBA", (128, 128))
    canvas.paste(picture, (32, 32))
    soft = random.random() < soft_share
    ground = background(random) if soft else Image.new("RGBA", canvas.size, "white")
    ground.alpha_composite(canvas)
    window = 64 / random.uniform(0.85, 1.15)
    slack = 4.0
    left, top = 64 - window / 2 + random.uniform(-slack, slack, size=2)
    box = (left, top, left + window, top + window)
    view = ground.convert("RGB").resize((side, side), Image.Resampling.BILINEAR, box=box)
    return np.asarray(view)


def background(random: np.random.Generator) -> Image.Image:
    """A few random colors that run into one another."""
    base = random.integers(0, 256, size=3)
    spread = random.uniform(0, 60)
    n = random.integers(2, 4)
    grid = np.clip(base + spread * random.standard_normal((n, n, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(grid).resize((128, 128), Image.Resampling.BICUBIC).convert("RGBA")


def make_palette(emoji: list[Emoji]) -> np.ndarray:
    """512 colors in [-1, 1] by k-means over the training pictures only."""
    from sklearn.cluster import KMeans

    random = np.random.default_rng(SEED)
    views = []
    for one in emoji:
        if one.split == "train":
            views.append(plain(one.pictures[0]))
            views.extend(augment(one, random) for _ in range(3))
    flat = np.concatenate([view.reshape(-1, 3) for view in views])
    # Each color weighs by the square root of its count: white is most of what
    # emoji show, but it needs one center only.
    unique, counts = np.unique(flat, axis=0, return_counts=True)
    picked = random.permutation(len(unique))[:150_000]
    kmeans = KMeans(N_COLORS, n_init=1, max_iter=60, random_state=SEED)
    kmeans.fit(unique[picked] / 127.5 - 1, sample_weight=np.sqrt(counts[picked]))
    # The published palettes are f32 values written as f64.
    centers = np.clip(kmeans.cluster_centers_, -1, 1).astype(np.float32)
    # Brightest first; white needs token 0 no more than any other.
    centers = centers[np.argsort(-centers.sum(axis=1), kind="stable")]
    print(f"palette: {len(unique)} colors of {len(views)} views, inertia {kmeans.inertia_:.1f}")
    return centers.astype(np.float64)


def preprocessor_json(clusters: np.ndarray) -> str:
    """The published keys, with one center a line."""
    values = {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "ImageGPTFeatureExtractor",
        "resample": 2,
        "size": SIDE,
    }
    centers = ",\n".join("    " + json.dumps(center) for center in clusters.tolist())
    rest = json.dumps(values, indent=2).removeprefix("{\n")
    return '{\n  "clusters": [\n' + centers + "\n  ],\n" + rest + "\n"


class Quantizer:
    """From pixels to tokens: the nearest center, in f64."""

    def __init__(self, model: Path = MODEL):
        from scipy.spatial import cKDTree

        self.clusters = np.array(json.loads((model / "preprocessor_config.json").read_text())["clusters"])
        self.tree = cKDTree(self.clusters)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        ids = self.tree.query(pixels.reshape(-1, 3) / 127.5 - 1)[1]
        return ids.reshape(*pixels.shape[:-3], -1).astype(np.int64)


def plain_tokens(emoji: list[Emoji], name: str, quantizer: Quantizer) -> np.ndarray:
    """Tokens of a split's base emoji on white, one row each."""
    return quantizer(np.stack([plain(one.pictures[0]) for one in emoji if one.split == name]))


def write_palette(emoji: list[Emoji]) -> None:
    MODEL.mkdir(exist_ok=True)
    path = MODEL / "preprocessor_config.json"
    path.write_text(preprocessor_json(make_palette(emoji)))
    # The tree's answers are the exact ones: a sample is searched in full.
    quantizer = Quantizer()
    colors = np.random.default_rng(SEED).integers(0, 256, size=(SIDE, SIDE, 3))
    exact = ((colors.reshape(-1, 1, 3) / 127.5 - 1 - quantizer.clusters) ** 2).sum(axis=-1).argmin(axis=1)
    assert (quantizer(colors) == exact).all()
    print(f"wrote {path.relative_to(ROOT)}")


def write_pictures(emoji: list[Emoji]) -> None:
    """The demo's pictures: five of the test split for each category.

    Three are of its largest subcategory and two of its next, so that there are
    look-alikes to find; which ones, the seed says, and never a result.
    """
    random = np.random.RandomState(SEED)
    for path in PICTURES.glob("**/*.png"):
        path.unlink()
    test = [one for one in emoji if one.split == "test"]
    for category in sorted({one.category for one in test} - {"Component"}):
        folder = PICTURES / slug(category)
        folder.mkdir(parents=True, exist_ok=True)
        by_size = Counter(one.subcategory for one in test if one.category == category).most_common(2)
        for (subcategory, _), n in zip(by_size, (3, 2), strict=False):
            chosen = [one for one in test if one.subcategory == subcategory]
            for idx in sorted(random.permutation(len(chosen))[:n]):
                (folder / f"{slug(chosen[idx].short_name)}.png").write_bytes(chosen[idx].png)
    print(f"wrote {len(list(PICTURES.glob('**/*.png')))} pictures to {PICTURES.relative_to(ROOT)}")


def write_classes(emoji: list[Emoji], folder: Path) -> None:
    """Directories of the splits and their classes, as `imagegpt probe fit` reads them.

    One for the categories, and one for the subcategories that are common enough to
    be classes.
    """
    n_train = Counter(one.subcategory for one in emoji if one.split == "train")
    n_test = Counter(one.subcategory for one in emoji if one.split == "test")
    common = {
        name for name, n in n_train.items() if n >= SUBCATEGORY_TRAIN_MIN and n_test[name] >= SUBCATEGORY_TEST_MIN
    }
    for task in ("category", "subcategory"):
        root = folder / task
        shutil.rmtree(root, ignore_errors=True)
        chosen = [one for one in emoji if task == "category" or one.subcategory in common]
        for one in chosen:
            path = root / one.split / getattr(one, task) / f"{slug(one.short_name)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            assert not path.exists(), path
            path.write_bytes(one.png)
        print(f"wrote {len(chosen)} pictures to {root}")


def slug(name: str) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in name.lower())
    return "-".join(words.split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--palette", action="store_true", help="make the palette again")
    parser.add_argument("--pictures", action="store_true", help="make the demo's pictures again")
    parser.add_argument("--classes", type=Path, metavar="DIR", help="write a directory per split and class")
    parser.add_argument("--prepared", type=Path, metavar="FILE.npz", help="write what timed.py needs")
    arguments = parser.parse_args()
    emoji = load()
    for name in SPLITS:
        chosen = [one for one in emoji if one.split == name]
        n_pictures = sum(len(one.pictures) for one in chosen)
        print(f"{name}: {len(chosen)} emoji, {n_pictures} pictures with skin tones")
    if arguments.palette:
        write_palette(emoji)
    if arguments.pictures:
        write_pictures(emoji)
    if arguments.prepared:
        write_prepared(emoji, arguments.prepared)
    if arguments.classes:
        write_classes(emoji, arguments.classes)


if __name__ == "__main__":
    main()
