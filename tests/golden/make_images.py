"""Makes tests/golden/images: one picture for every way a picture can be stored.

    python tests/golden/make_images.py --emoji DIR

DIR is package/img/google/64 of the npm package emoji-datasource-google 16.0.0.
Same versions as models/requirements.txt. Encoders change between versions, so
the committed pictures count and not what this makes again.
"""

import argparse
import io
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

IMAGES = Path(__file__).resolve().parent / "images"
RANDOM = np.random.RandomState(32)
ORIENTATION = 0x0112
RGBA_EMOJI = [
    "1f1ef-1f1f5",
    "1f308",
    "1f30b",
    "1f355",
    "1f3a8",
    "1f600",
    "1f98b",
    "1f9d1-1f3fe-200d-1f680",
]
N_LA_EMOJI = 4


def noise(width: int, height: int, channels: int) -> np.ndarray:
    return RANDOM.randint(0, 256, (height, width, channels)).astype(np.uint8)


def smooth(width: int, height: int) -> np.ndarray:
    """Gradients in integers, which PNG stores in little space."""
    y, x = np.mgrid[0:height, 0:width]
    red = x * 255 // max(width - 1, 1)
    green = y * 255 // max(height - 1, 1)
    blue = (x // 8 + y // 4) % 256
    return np.stack([red, green, blue], axis=2).astype(np.uint8)


def corners(width: int = 48, height: int = 32) -> np.ndarray:
    """No two orientations of it look alike. Blocks of 16 survive JPEG."""
    picture = np.full((height, width, 3), 200, np.uint8)
    picture[:16, :16] = (220, 30, 30)
    picture[:16, -16:] = (30, 180, 60)
    picture[-16:, :16] = (40, 60, 210)
    picture[-16:, -16:] = (240, 220, 40)
    return picture


def exif(orientation: int) -> bytes:
    values = Image.Exif()
    values[ORIENTATION] = orientation
    return values.tobytes()


def exif_big_endian(orientation: int) -> bytes:
    entry = struct.pack(">HHIHH", ORIENTATION, 3, 1, orientation, 0)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry + struct.pack(">I", 0)


def xmp(orientation: int) -> bytes:
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
        f'tiff:Orientation="{orientation}"/></rdf:RDF></x:xmpmeta>'
    ).encode()


def save(name: str, picture, **options) -> None:
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture.squeeze(2) if picture.shape[2:] == (1,) else picture)
    picture.save(IMAGES / name, **options)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


PNG_COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]


def save_png(name: str, pixels: np.ndarray, interlaced: bool = False, chunks: bytes = b"") -> None:
    """What Pillow cannot write: 16 bits a channel, and interlacing."""
    height, width, channels = pixels.shape
    passes = ADAM7 if interlaced else [(0, 0, 1, 1)]
    rows = b""
    for x, y, x_step, y_step in passes:
        for row in pixels[y::y_step, x::x_step]:
            if row.size:
                rows += b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes()
    header = struct.pack(
        ">IIBBBBB", width, height, 8 * pixels.itemsize, PNG_COLOR_TYPES[channels], 0, 0, interlaced
    )
    (IMAGES / name).write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + chunks
        + png_chunk(b"IDAT", zlib.compress(rows, 9))
        + png_chunk(b"IEND", b"")
    )


def noise16(width: int, height: int, channels: int) -> np.ndarray:
    return RANDOM.randint(0, 65536, (height, width, channels)).astype(np.uint16)


def gif_on_larger_screen(name: str, picture: Image.Image, **options) -> None:
    """A first frame that covers a part of its canvas only."""
    file = io.BytesIO()
    picture.save(file, "GIF", **options)
    data = bytearray(file.getvalue())
    struct.pack_into("<HH", data, 6, 40, 30)
    at = 13 + 3 * 2 ** ((data[10] & 7) + 1)
    while data[at] == 0x21:
        at += 2
        while data[at]:
            at += data[at] + 1
        at += 1
    assert data[at] == 0x2C
    struct.pack_into("<HH", data, at + 1, 10, 5)
    (IMAGES / name).write_bytes(data)


def make_sizes() -> None:
    for width, height in ((1, 1), (31, 33), (32, 32), (33, 31), (64, 65), (2, 3), (100, 37)):
        save(f"size-{width}x{height}.png", noise(width, height, 3))
    # The crop's offset is 0.5 and 1.5 here, rounded to even.
    save("size-224x225.png", noise(224, 225, 1))
    save("size-227x224.png", noise(227, 224, 1))
    save("size-1x4000.png", noise(1, 4000, 3))
    save("size-4000x1.png", noise(4000, 1, 3))
    save("size-4000x3000.png", smooth(4000, 3000), optimize=True)
    save("size-3000x4000.webp", smooth(3000, 4000)[:, :, ::-1].copy(), lossless=True)


def make_png() -> None:
    rgba = noise(40, 30, 4)
    # A quarter is transparent and a quarter opaque; all keep their colors.
    rgba[:15, :20, 3] = 0
    rgba[15:, 20:, 3] = 255
    save("png-rgba.png", rgba)
    alphas, values = np.mgrid[0:256, 0:256].astype(np.uint8)
    save("png-rgba-every-alpha.png", np.stack([values, values, 255 - values, alphas], axis=2))
    save("png-rgba-half.png", np.dstack([smooth(48, 48), np.full((48, 48), 128, np.uint8)]))
    save("png-rgba-clear.png", np.dstack([smooth(48, 48), np.zeros((48, 48), np.uint8)]))
    save("png-la.png", Image.fromarray(noise(40, 30, 2), "LA"))
    save("png-l.png", noise(40, 30, 1))
    save("png-l-key.png", noise(40, 30, 1) // 32 * 32, transparency=64)
    save("png-1.png", Image.fromarray(noise(50, 41, 1).squeeze()).convert("1"))
    save("png-1-key.png", Image.fromarray(noise(50, 41, 1).squeeze()).convert("1"), transparency=0)
    rgb = noise(40, 30, 3) // 128 * 255
    save("png-rgb-key.png", rgb, transparency=(255, 0, 0))
    palette = Image.fromarray(smooth(60, 44)).quantize(200)
    save("png-p.png", palette)
    save("png-p-alpha.png", palette, transparency=bytes(RANDOM.randint(0, 256, 150).astype(np.uint8)))
    save("png-p-key.png", palette, transparency=7)
    for bits in (1, 2, 4):
        few = Image.fromarray(smooth(61, 43)).quantize(2**bits)
        save(f"png-p-{bits}bit.png", few, bits=bits)
    save("png-p-4bit-alpha.png", few, bits=4, transparency=bytes([0, 60, 120, 180]))
    save("png-i16.png", noise16(40, 30, 1))
    save_png("png-la16.png", noise16(40, 30, 2))
    save_png("png-rgb16.png", noise16(40, 30, 3))
    save_png("png-rgba16.png", noise16(40, 30, 4))
    save_png("png-interlaced-rgb.png", noise(37, 29, 3), interlaced=True)
    save_png("png-interlaced-rgba.png", noise(37, 29, 4), interlaced=True)
    save_png("png-interlaced-l.png", noise(3, 2, 1), interlaced=True)
    save_png("png-interlaced-i16.png", noise16(37, 29, 1), interlaced=True)
    gamma = png_chunk(b"gAMA", struct.pack(">I", 100_000))
    save_png("png-gamma.png", noise(40, 30, 3), chunks=gamma)
    frames = [Image.fromarray(noise(32, 24, 3)) for _ in range(3)]
    save("png-animated.png", frames[0], save_all=True, append_images=frames[1:])


def make_jpeg(china: Image.Image, flower: Image.Image) -> None:
    half = flower.resize((320, 214), Image.Resampling.LANCZOS)
    save("jpeg-444.jpg", half, quality=92, subsampling=0)
    save("jpeg-422.jpg", half, quality=90, subsampling=1)
    save("jpeg-420.jpg", half, quality=85, subsampling=2)
    save("jpeg-420-odd.jpg", half.crop((0, 0, 161, 107)), quality=85, subsampling=2)
    save("jpeg-progressive.jpg", half, quality=85, progressive=True)
    save("jpeg-restart.jpg", half, quality=85, restart_marker_blocks=8)
    save("jpeg-low-quality.jpg", half, quality=20)
    save("jpeg-gray.jpg", half.convert("L"), quality=90)
    save("jpeg-gray-progressive.jpg", half.convert("L"), quality=90, progressive=True)
    save("jpeg-cmyk.jpg", half.convert("CMYK"), quality=92)
    save("jpeg-rgb.jpg", half, quality=90, keep_rgb=True)
    save("jpeg-photo.jpg", china, quality=90)


def make_orientations() -> None:
    picture = Image.fromarray(corners())
    for orientation in range(1, 9):
        save(f"exif-{orientation}.jpg", picture, quality=98, subsampling=0, exif=exif(orientation))
        save(f"exif-{orientation}.png", picture, exif=exif(orientation))
    save("exif-6-big-endian.png", picture, exif=exif_big_endian(6))
    save("exif-5-big-endian.jpg", picture, quality=98, subsampling=0, exif=exif_big_endian(5))
    save("exif-9-invalid.png", picture, exif=exif(9))
    save("exif-8.webp", picture, lossless=True, exif=exif(8))
    save("exif-6.tiff", picture, tiffinfo={ORIENTATION: 6})
    save("exif-3.tiff", picture, tiffinfo={ORIENTATION: 3}, compression="tiff_lzw")
    save("exif-6-rgba.png", np.dstack([corners(), noise(48, 32, 1)]), exif=exif(6))
    save("xmp-6.jpg", picture, quality=98, subsampling=0, xmp=xmp(6))
    both = {"exif": exif(1), "xmp": xmp(6)}
    save("xmp-6-exif-1.jpg", picture, quality=98, subsampling=0, **both)


def make_bmp() -> None:
    save("bmp-rgb.bmp", noise(41, 30, 3))
    save("bmp-l.bmp", noise(41, 30, 1))
    save("bmp-1.bmp", Image.fromarray(noise(50, 41, 1).squeeze()).convert("1"))
    save("bmp-p.bmp", Image.fromarray(smooth(61, 43)).quantize(100))
    save("bmp-rgba.bmp", noise(41, 30, 4))


def make_gif() -> None:
    palette = Image.fromarray(smooth(60, 44)).quantize(64)
    save("gif-p.gif", palette)
    save("gif-p-key.gif", palette, transparency=5)
    save("gif-l.gif", noise(40, 30, 1))
    save("gif-interlaced.gif", palette, interlace=True)
    frames = [Image.fromarray(noise(30, 20, 3)).quantize(32) for _ in range(3)]
    save("gif-animated.gif", frames[0], save_all=True, append_images=frames[1:], duration=50)
    clear = [frame.copy() for frame in frames]
    save("gif-animated-key.gif", clear[0], save_all=True, append_images=clear[1:], transparency=3, disposal=2)
    part = Image.fromarray(smooth(20, 20)).quantize(16)
    gif_on_larger_screen("gif-part.gif", part)
    gif_on_larger_screen("gif-part-key.gif", part, transparency=2)


def make_webp(china: Image.Image) -> None:
    quarter = china.resize((320, 214), Image.Resampling.LANCZOS)
    save("webp-lossless.webp", noise(40, 30, 3), lossless=True)
    save("webp-lossless-rgba.webp", noise(40, 30, 4), lossless=True, exact=True)
    save("webp-lossy.webp", quarter, quality=85)
    fade = np.mgrid[0:214, 0:320][1] * 255 // 319
    save("webp-lossy-rgba.webp", np.dstack([np.array(quarter), fade.astype(np.uint8)]), quality=85)
    frames = [Image.fromarray(noise(30, 20, 3)) for _ in range(2)]
    save("webp-animated.webp", frames[0], save_all=True, append_images=frames[1:], lossless=True)
    frames = [Image.fromarray(noise(30, 20, 4)) for _ in range(2)]
    save("webp-animated-rgba.webp", frames[0], save_all=True, append_images=frames[1:], lossless=True, exact=True)


def make_tiff() -> None:
    save("tiff-rgb.tiff", noise(40, 30, 3))
    save("tiff-rgb-lzw.tiff", smooth(90, 70), compression="tiff_lzw")
    save("tiff-rgb-deflate.tiff", smooth(90, 70), compression="tiff_adobe_deflate")
    save("tiff-rgba.tiff", noise(40, 30, 4))
    save("tiff-l.tiff", noise(40, 30, 1))
    save("tiff-i16.tiff", noise16(40, 30, 1))
    save("tiff-p.tiff", Image.fromarray(smooth(60, 44)).quantize(64))
    save("tiff-1.tiff", Image.fromarray(noise(50, 41, 1).squeeze()).convert("1"))
    save("tiff-cmyk.tiff", Image.fromarray(noise(40, 30, 4), "CMYK"))


def copy_emoji(folder: Path) -> None:
    names = [f"{name}.png" for name in RGBA_EMOJI]
    modes = {path.name: Image.open(path).mode for path in sorted(folder.glob("*.png"))}
    names += [name for name, mode in modes.items() if mode == "LA"][:N_LA_EMOJI]
    names += [name for name, mode in modes.items() if mode == "P"]
    for name in names:
        shutil.copy(folder / name, IMAGES / f"emoji-{name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--emoji", type=Path, required=True, help="folder of 64x64 PNGs")
    arguments = parser.parse_args()
    shutil.rmtree(IMAGES, ignore_errors=True)
    IMAGES.mkdir()
    china = Image.fromarray(load_sample_image("china.jpg"))
    flower = Image.fromarray(load_sample_image("flower.jpg"))
    make_sizes()
    make_png()
    make_jpeg(china, flower)
    make_orientations()
    make_bmp()
    make_gif()
    make_webp(china)
    make_tiff()
    save("photo-china.png", china)
    save("photo-flower.png", flower.crop((150, 0, 577, 427)), optimize=True)
    copy_emoji(arguments.emoji)


if __name__ == "__main__":
    main()
