"""Makes JPEGs of scikit-learn's two sample photographs.

usage: make_jpegs.py DIR [--count N]

Quality 30 to 95, all samplings that Pillow writes, progressive or not, gray and CMYK, restart markers, odd sizes. If
cjpeg is there (Debian's libjpeg-turbo-progs), a fifth of the files are its: in other samplings, and with arithmetic
codes. The same count gives the same files with the same versions.
"""

import argparse
import io
import random
import shutil
import subprocess
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_image

SAMPLINGS = {"444": 0, "422": 1, "420": 2}
# Of luma and chroma, horizontal and vertical.
CJPEG_SAMPLINGS = ["1x1", "2x1", "1x2", "2x2", "4x1", "1x4", "4x2", "2x4", "3x1", "1x3", "3x2", "2x2,2x1", "2x2,1x2,1x1"]


def crop(photo: Image.Image, dice: random.Random) -> Image.Image:
    width, height = dice.choice([(640, 427), (320, 214), (161, 107), (97, 130), (33, 17), (16, 16), (5, 9), (3, 2)])
    left, top = dice.randrange(641 - width), dice.randrange(428 - height)
    return photo.crop((left, top, left + width, top + height))


def make(folder: Path, number: int, picture: Image.Image, dice: random.Random) -> None:
    mode = dice.choices(["RGB", "L", "CMYK"], [8, 1, 1])[0]
    options = {"quality": dice.randint(30, 95), "progressive": dice.random() < 0.4, "optimize": dice.random() < 0.3}
    name = [f"{number:04}", mode.lower(), f"{picture.width}x{picture.height}", f"q{options['quality']}"]
    if mode == "RGB":
        sampling = dice.choice(list(SAMPLINGS))
        options["subsampling"] = SAMPLINGS[sampling]
        name.append(sampling)
    if options["progressive"]:
        name.append("progressive")
    if dice.random() < 0.2:
        options["restart_marker_blocks"] = dice.randint(1, 9)
        name.append("restart")
    picture.convert(mode).save(folder / f"{'-'.join(name)}.jpg", **options)


def make_with_cjpeg(folder: Path, number: int, picture: Image.Image, dice: random.Random) -> None:
    sampling = dice.choice(CJPEG_SAMPLINGS)
    quality = dice.randint(30, 95)
    options = [option for option in ("-progressive", "-arithmetic") if dice.random() < 0.4]
    if dice.random() < 0.3:
        options += ["-restart", f"{dice.randint(1, 9)}B"]
    file = io.BytesIO()
    picture.save(file, "PPM")
    command = ["cjpeg", "-quality", str(quality), "-sample", sampling, *options]
    name = [f"{number:04}", f"{picture.width}x{picture.height}", f"q{quality}", sampling, *options[:2]]
    jpeg = subprocess.run(command, input=file.getvalue(), stdout=subprocess.PIPE, check=True).stdout
    (folder / f"{'-'.join(part.strip('-') for part in name)}.jpg").write_bytes(jpeg)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dir", type=Path)
    parser.add_argument("--count", type=int, default=500)
    arguments = parser.parse_args()
    arguments.dir.mkdir(parents=True, exist_ok=True)
    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    dice = random.Random(27)
    cjpeg = shutil.which("cjpeg")
    for number in range(arguments.count):
        picture = crop(dice.choice(photos), dice)
        write = make_with_cjpeg if cjpeg and number % 5 == 0 else make
        write(arguments.dir, number, picture, dice)
    print(f"{len(list(arguments.dir.glob('*.jpg')))} files in {arguments.dir}")


if __name__ == "__main__":
    main()
