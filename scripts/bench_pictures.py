"""Compares the preprocessing with Pillow's on one core, step by step and format by format.

usage: bench_pictures.py [--rounds N] [--milliseconds N] [FILE...]

Without files it makes some of one of scikit-learn's photographs. In each round each file goes through our steps
(`cargo bench --bench preprocess`) and then through Pillow's: open, load and convert("RGB"), then resize((32, 32),
BILINEAR). The table has images per second, medians of the rounds. `tokenize` is ours from the file's bytes to the
tokens, in which rows are resized as they are decoded; the ratio is to Pillow's decoding and resizing, without the
nearest colors. The last line is the number of cores that feed an H200 (3,400 images of imagegpt-small per second).
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

import PIL
from PIL import Image
from sklearn.datasets import load_sample_image

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "target" / "bench-pictures"
SIDE = 32
FED = 3400


def make() -> list[Path]:
    """A photograph of 640 x 427, and of 4000 x 3000."""
    photo = Image.fromarray(load_sample_image("china.jpg"))
    large = photo.resize((4000, 3000), Image.Resampling.LANCZOS)
    files = {
        "640x427-420.jpg": (photo, {"quality": 85}),
        "640x427-444.jpg": (photo, {"quality": 95, "subsampling": 0}),
        "640x427-progressive.jpg": (photo, {"quality": 85, "progressive": True}),
        "640x427.png": (photo, {}),
        "640x427.webp": (photo, {"quality": 80}),
        "64x64.png": (photo.resize((64, 64)), {}),
        "4000x3000-420.jpg": (large, {"quality": 85}),
        "4000x3000-progressive.jpg": (large, {"quality": 85, "progressive": True}),
        "4000x3000.webp": (large, {"quality": 80}),
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, (picture, options) in files.items():
        picture.save(FOLDER / name, **options)
    return [FOLDER / name for name in files]


def pillow(data: bytes, seconds: float) -> dict[str, float]:
    """Median seconds of Pillow's steps, repeated for some time."""
    steps = {"decode": [], "resize": []}
    began = time.perf_counter()
    while len(steps["decode"]) < 3 or time.perf_counter() - began < seconds:
        started = time.perf_counter()
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        decoded = time.perf_counter()
        picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        steps["decode"].append(decoded - started)
        steps["resize"].append(time.perf_counter() - decoded)
    return {step: statistics.median(values) for step, values in steps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--milliseconds", type=int, default=500, help="of each file, side and round")
    parser.add_argument("files", nargs="*", type=Path)
    arguments = parser.parse_args()
    files = [path.resolve() for path in arguments.files] or make()
    # What is built first, on all cores.
    bench = ["cargo", "bench", "--locked", "--quiet", "--bench", "preprocess"]
    subprocess.run([*bench, "--no-run"], cwd=ROOT, check=True)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    ours = subprocess.Popen(bench, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    seen = {path: [] for path in files}
    for _ in range(arguments.rounds):
        for path, rounds in seen.items():
            ours.stdin.write(f"{arguments.milliseconds} {path}\n")
            ours.stdin.flush()
            steps = json.loads(ours.stdout.readline())
            rounds.append((steps, pillow(path.read_bytes(), arguments.milliseconds / 1e3)))
    ours.stdin.close()
    ours.wait()
    cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    flags = next(line.split() for line in open("/proc/cpuinfo") if line.startswith("flags"))
    vectors = [name for name in ("avx2", "avx512f") if name in flags]
    print(f"{cpu} ({', '.join(vectors)}), one core, {arguments.rounds} rounds, Pillow {PIL.__version__}; images/s")
    print(f"{'':26} {'ours':>47}   {'Pillow':>17}")
    print(f"{'':26} {'decode':>8} {'resize':>8} {'crop':>8} {'colors':>8} {'tokenize':>11}"
          f"   {'decode':>8} {'resize':>8} {'both':>8} {'ratio':>7}")
    for path, rounds in seen.items():
        own = {step: statistics.median(one[0][step] for one in rounds) for step in rounds[0][0]}
        theirs = {step: statistics.median(one[1][step] for one in rounds) for step in rounds[0][1]}
        both = theirs["decode"] + theirs["resize"]
        rates = [1 / own[step] for step in ("decode", "resize", "crop", "quantize")]
        print(f"{path.name:26} {' '.join(f'{rate:8.0f}' for rate in rates)} {1 / own['tokenize']:11.0f}"
              f"   {1 / theirs['decode']:8.0f} {1 / theirs['resize']:8.0f} {1 / both:8.0f} {both / own['tokenize']:6.2f}x")
    first = files[0]
    cores = FED * statistics.median(one[0]["tokenize"] for one in seen[first])
    print(f"{cores:.1f} cores make the tokens of {FED} images like {first.name} per second")


if __name__ == "__main__":
    main()
