"""Makes small BMP, DIB, GIF and TIFF files of every kind that Pillow tells apart.

usage: make_lossless.py [--one-of-each] DIR

Each file is packed here from its parts, since no library writes all kinds: headers, masks, palettes, run lengths and
orders of rows for BMP; frames without a palette for GIF; photometric interpretations, samples, byte and bit orders,
compressions, strips, tiles and planes for TIFF. With --one-of-each, each kind of TIFF has one compression and byte
order instead of all eight pairs. The files are the same with the same versions.
"""

import argparse
import io
import itertools
import random
import struct
import zlib
from pathlib import Path

from PIL import Image

SIZE = (13, 7)
DICE = random.Random(32)


def noise(count: int) -> bytes:
    return DICE.randbytes(count)


# BMP


def palette(colors: int, padding: int = 1) -> bytes:
    return b"".join(DICE.randbytes(3) + bytes(padding) for _ in range(colors))


def gray_palette(colors: int) -> bytes:
    step = 255 if colors == 2 else 1
    return b"".join(bytes([index * step] * 3 + [0]) for index in range(colors))


def bmp(
    bits: int,
    body: bytes | None = None,
    *,
    header: int = 40,
    size: tuple[int, int] = SIZE,
    compression: int = 0,
    colors: int = 0,
    table: bytes = b"",
    masks: tuple[int, ...] = (),
    planes: int = 1,
    data_size: int = 0,
    file_header: bool = True,
    gap: int = 0,
    offset: int | None = None,
) -> bytes:
    width, height = size
    if header == 12:
        info = struct.pack("<IHHHH", 12, width, height, planes, bits)
    else:
        fields = (width, height, planes, bits, compression, data_size, 2835, 2835, colors, 0)
        info = struct.pack("<IiiHHIIiiII", header, *fields)
        info += struct.pack(f"<{len(masks)}I", *masks)
        info = info.ljust(header, b"\0")
    if body is None:
        body = noise((width * bits + 31) // 32 * 4 * abs(height))
    start = 14 + len(info) + len(table) + gap
    parts = info + table + bytes(gap) + body
    if not file_header:
        return parts
    return b"BM" + struct.pack("<IHHI", len(parts) + 14, 0, 0, start if offset is None else offset) + parts


MASKS = {
    16: {"565": (0xF800, 0x7E0, 0x1F), "555": (0x7C00, 0x3E0, 0x1F), "444": (0xF00, 0xF0, 0xF)},
    24: {"888": (0xFF0000, 0xFF00, 0xFF)},
    32: {
        "bgrx": (0xFF0000, 0xFF00, 0xFF, 0),
        "xbgr": (0xFF000000, 0xFF0000, 0xFF00, 0),
        "bgxr": (0xFF000000, 0xFF00, 0xFF, 0),
        "abgr": (0xFF000000, 0xFF0000, 0xFF00, 0xFF),
        "rgba": (0xFF, 0xFF00, 0xFF0000, 0xFF000000),
        "bgra": (0xFF0000, 0xFF00, 0xFF, 0xFF000000),
        "bgar": (0xFF000000, 0xFF00, 0xFF, 0xFF0000),
        "none": (0, 0, 0, 0),
        "odd": (0x3FF00000, 0xFFC00, 0x3FF, 0),
    },
}


def runs(width: int, height: int, nibbles: bool, skips: bool, start: int = 0) -> bytes:
    """Run lengths of whole rows: runs, pixels that stand for themselves, ends of rows, and skips."""
    body = bytearray()
    x = y = 0
    while y < height:
        left = width - x
        kind = DICE.randrange(5 if skips else 3)
        if kind == 0 and left > 2:
            count = DICE.randint(3, left)
            body += bytes([0, count]) + noise((count + 1) // 2 if nibbles else count)
            body += bytes((start + len(body)) % 2)
            x += count
        elif kind == 3 and left > 1 and y + 1 < height:
            right, down = DICE.randrange(left), DICE.randrange(2)
            body += bytes([0, 2, right, down])
            x, y = x + right, y + down
        elif kind == 4 and x > 0:
            x = width
        elif left:
            count = DICE.randint(1, left)
            body += bytes([count]) + noise(1)
            x += count
        if x >= width:
            body += b"\0\0"
            x, y = 0, y + 1
    return bytes(body + b"\0\1")


def bmps() -> dict[str, bytes]:
    files = {}
    for bits, header in itertools.product((1, 4, 8), (12, 40, 52, 56, 64, 108, 124)):
        table = palette(1 << bits, 0 if header == 12 else 1)
        files[f"{bits}-h{header}"] = bmp(bits, header=header, table=table)
    for bits, header in itertools.product((16, 24, 32), (12, 40, 56, 64, 108, 124)):
        files[f"{bits}-h{header}"] = bmp(bits, header=header)
    for bits, header in itertools.product((2, 3, 48), (12, 40)):
        files[f"{bits}-h{header}"] = bmp(bits, header=header, table=palette(4, 0 if header == 12 else 1))
    files["24-h16"] = bmp(24, header=40)[:14] + struct.pack("<IIIHH", 16, *SIZE, 1, 24) + noise(400)
    for bits, table in MASKS.items():
        for name, masks in table.items():
            files[f"{bits}-masks-{name}"] = bmp(bits, compression=3, header=56, masks=masks)
            files[f"{bits}-masks-{name}-v5"] = bmp(bits, compression=3, header=124, masks=masks)
            if len(masks) < 4 or masks[3] == 0:
                files[f"{bits}-masks-{name}-h52"] = bmp(bits, compression=3, header=52, masks=masks)
            behind = struct.pack("<3I", *masks[:3])
            files[f"{bits}-masks-{name}-h40"] = bmp(bits, compression=3, table=behind)
            files[f"{bits}-masks-{name}-dib"] = bmp(bits, compression=3, table=behind, file_header=False)
    files["16-masks-gap"] = bmp(16, compression=3, table=struct.pack("<3I", 0xF800, 0x7E0, 0x1F), gap=5)
    files["8-masks"] = bmp(8, compression=3, table=struct.pack("<3I", 1, 2, 4) + palette(256))
    for bits in (1, 4, 8):
        count = 1 << bits
        files[f"{bits}-few"] = bmp(bits, colors=count // 2 + 1, table=palette(count // 2 + 1))
        files[f"{bits}-few-gap"] = bmp(bits, colors=count // 2 + 1, table=palette(count // 2 + 1), gap=7)
        files[f"{bits}-one"] = bmp(bits, colors=1, table=palette(1))
        files[f"{bits}-one-black"] = bmp(bits, colors=1, table=bytes(4))
        files[f"{bits}-black-white"] = bmp(bits, colors=2, table=gray_palette(2))
        files[f"{bits}-white-black"] = bmp(bits, colors=2, table=gray_palette(2)[4:] + bytes(4))
        files[f"{bits}-gray"] = bmp(bits, table=gray_palette(count))
        files[f"{bits}-gray-few"] = bmp(bits, colors=max(count // 2, 1), table=gray_palette(max(count // 2, 3)))
        files[f"{bits}-many"] = bmp(bits, colors=300, table=palette(300))
        files[f"{bits}-gray-many"] = bmp(bits, colors=300, table=b"".join(bytes([i % 256] * 3 + [0]) for i in range(300)))
        files[f"{bits}-no-offset"] = bmp(bits, table=palette(count), offset=0)
        files[f"{bits}-offset-of-palette"] = bmp(bits, table=palette(count), offset=54)
        files[f"{bits}-offset-early"] = bmp(bits, table=palette(count), offset=60)
        files[f"{bits}-top-down"] = bmp(bits, size=(13, -7), body=noise(13 * 4 * 7), table=palette(count))
        files[f"{bits}-dib"] = bmp(bits, table=palette(count), file_header=False)
        files[f"{bits}-dib-h12"] = bmp(bits, header=12, table=palette(count, 0), file_header=False)
        files[f"{bits}-cut-palette"] = bmp(bits, table=palette(count))[: 54 + 2 * count]
        files[f"{bits}-padding-missing"] = bmp(bits, size=(33, 3), table=palette(count))[: -3 if bits != 4 else -3]
    files["1-black-white-inverse"] = bmp(1, colors=2, table=b"\xff\xff\xff\0" + bytes(4))
    for bits in (16, 24, 32):
        files[f"{bits}-top-down"] = bmp(bits, size=(13, -7), body=noise(13 * 4 * 7))
        files[f"{bits}-dib"] = bmp(bits, file_header=False)
        files[f"{bits}-no-offset"] = bmp(bits, offset=0)
        files[f"{bits}-palette"] = bmp(bits, colors=5, table=palette(5))
        files[f"{bits}-palette-dib"] = bmp(bits, colors=5, table=palette(5), file_header=False)
        files[f"{bits}-cut"] = bmp(bits)[:-9]
        files[f"{bits}-wrong-size"] = bmp(bits, data_size=3)
        files[f"{bits}-planes"] = bmp(bits, planes=7)
        files[f"{bits}-planes-dib"] = bmp(bits, planes=7, file_header=False)
    files["24-padding-missing"] = bmp(24, size=(5, 3))[:-1]
    files["24-height-odd"] = bmp(24, bytes(400), size=(5, -(2**31)))
    files["24-height-negative-large"] = bmp(24, bytes(400), size=(5, -(2**24) - 1))
    files["24-empty"] = bmp(24, size=(0, 7))
    files["24-rle"] = bmp(24, b"\1\2\0\1", compression=1)
    for name, compression in {"huffman": 3, "jpeg": 4, "png": 5, "rle24": 4, "odd": 99}.items():
        files[f"24-{name}"] = bmp(24, compression=compression, table=bytes(12) if compression == 3 else b"")
    for nibbles in (False, True):
        bits = 4 if nibbles else 8
        code, name, count = (2, "rle4", 16) if nibbles else (1, "rle8", 256)
        few = count // 2
        table = palette(few)
        base = {"compression": code, "colors": few, "table": table}
        start = 14 + 40 + len(table)
        for index in range(4):
            files[f"{name}-{index}"] = bmp(bits, runs(*SIZE, nibbles, False, start), **base)
            files[f"{name}-skips-{index}"] = bmp(bits, runs(*SIZE, nibbles, True, start), **base)
        files[f"{name}-odd-start"] = bmp(bits, runs(*SIZE, nibbles, True, start + 1), gap=1, **base)
        files[f"{name}-odd-start-unaligned"] = bmp(bits, runs(*SIZE, nibbles, False, start), gap=1, **base)
        files[f"{name}-top-down"] = bmp(bits, runs(*SIZE, nibbles, True, start), size=(13, -7), **base)
        files[f"{name}-dib"] = bmp(bits, runs(*SIZE, nibbles, True, start - 14), file_header=False, **base)
        files[f"{name}-gray"] = bmp(bits, runs(*SIZE, nibbles, True, start), **{**base, "table": gray_palette(few)})
        files[f"{name}-black-white"] = bmp(
            bits, runs(*SIZE, nibbles, True, 62), compression=code, colors=2, table=gray_palette(2)
        )
        files[f"{name}-other-bits"] = bmp(12 - bits, runs(*SIZE, nibbles, True, start), **base)
        files[f"{name}-1bit"] = bmp(1, runs(*SIZE, nibbles, True, start), **base)
        files[f"{name}-early-end"] = bmp(bits, b"\5\7\0\0\3\1\0\1", **base)
        files[f"{name}-early-end-cut"] = bmp(bits, b"\5\7\0\0\3\1", **base)
        files[f"{name}-delta-to-end"] = bmp(bits, b"\5\7\0\2\0\xff\0\1", **base)
        files[f"{name}-delta-all"] = bmp(bits, b"\0\2\0\7\0\1", **base)
        files[f"{name}-long-runs"] = bmp(bits, b"\xff\x12\0\0" * 7 + b"\0\1", **base)
        files[f"{name}-runs-without-ends"] = bmp(bits, b"\x0d\x12" * 7 + b"\0\1", **base)
        files[f"{name}-long-copies"] = bmp(bits, (b"\0\x1a" + noise(13 if nibbles else 26)) * 4, **base)
        files[f"{name}-copies-beyond"] = bmp(bits, (b"\0\x10" + noise(8 if nibbles else 16) + b"\0\0") * 8, **base)
        files[f"{name}-empty-rows"] = bmp(bits, b"\0\0" * 3 + b"\x0d\x31\0\0" * 7 + b"\0\1", **base)
        files[f"{name}-no-end"] = bmp(bits, b"\x0d\x31\0\0" * 7, **base)
    return {f"bmp-{name}.bmp" if "dib" not in name else f"bmp-{name}.dib": file for name, file in files.items()}


# TIFF


class Tiff:
    def __init__(self, order: str = "<", big: bool = False) -> None:
        self.order = order
        self.big = big
        self.tags: dict[int, tuple[int, list]] = {}

    def tag(self, number: int, values, kind: int = 3) -> "Tiff":
        self.tags[number] = (kind, values if isinstance(values, (list, tuple, bytes)) else [values])
        return self

    FORMATS = {1: "B", 2: "s", 3: "H", 4: "I", 6: "b", 7: "B", 8: "h", 9: "i", 11: "f", 12: "d", 13: "I", 16: "Q"}

    def pack(self, kind: int, values) -> bytes:
        if isinstance(values, bytes):
            return values
        if kind in (5, 10):
            return b"".join(struct.pack(self.order + "II", *value) for value in values)
        return struct.pack(f"{self.order}{len(values)}{self.FORMATS[kind]}", *values)

    def build(self, chunks: list[bytes], places: tuple[int, int] = (273, 279), lens: bool = True) -> bytes:
        order, width = self.order, 8 if self.big else 4
        self.tag(places[0], [0] * len(chunks), 4)
        if lens:
            self.tag(places[1], [len(chunk) for chunk in chunks], 4)
        word = "Q" if self.big else "I"
        start = 16 if self.big else 8
        directory = (8 if self.big else 2) + len(self.tags) * (20 if self.big else 12) + width
        sizes = [len(self.pack(*entry)) for entry in self.tags.values()]
        at = start + directory + sum(size + size % 2 for size in sizes if size > width)
        offsets = []
        for chunk in chunks:
            offsets.append(at)
            at += len(chunk)
        self.tag(places[0], offsets, 4)
        head = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if self.big else 42)
        if self.big:
            head += struct.pack(order + "HH", 8, 0)
        head += struct.pack(order + word, start)
        entries, tail = b"", b""
        for number, (kind, values) in sorted(self.tags.items()):
            packed = self.pack(kind, values)
            entries += struct.pack(order + "HH" + word, number, kind, len(packed) if isinstance(values, bytes) else len(values))
            if len(packed) > width:
                entries += struct.pack(order + word, start + directory + len(tail))
                tail += packed + bytes(len(packed) % 2)
            else:
                entries += packed.ljust(width, b"\0")
        count = struct.pack(order + ("Q" if self.big else "H"), len(self.tags))
        return head + count + entries + bytes(width) + tail + b"".join(chunks)


def lzw(data: bytes) -> bytes:
    """LZW codes of TIFF, the highest bit first, without a table: each byte alone, with codes that clear."""
    bits, out = "", []
    for at in range(0, len(data), 200):
        out.append(256)
        out.extend(data[at : at + 200])
    out.append(257)
    bits = "".join(f"{code:09b}" for code in out)
    bits = bits.ljust((len(bits) + 7) // 8 * 8, "0")
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def pack_bits(data: bytes) -> bytes:
    return b"".join(bytes([len(data[at : at + 99]) - 1]) + data[at : at + 99] for at in range(0, len(data), 99))


def turn_bits(data: bytes) -> bytes:
    return bytes(int(f"{byte:08b}"[::-1], 2) for byte in data)


CODECS = {"none": (1, bytes), "lzw": (5, lzw), "deflate": (8, lambda d: zlib.compress(d, 9)), "packbits": (32773, pack_bits)}
ORDERS = {"ii": "<", "mm": ">"}


def tiff(
    photometric: int | None,
    bits: int,
    samples: int = 1,
    *,
    order: str = "<",
    big: bool = False,
    codec: str = "none",
    size: tuple[int, int] = SIZE,
    rows: int | None = None,
    tile: tuple[int, int] | None = None,
    planar: bool = False,
    fill: int = 1,
    extra: tuple[int, ...] | None = None,
    sample_format: int | None = None,
    predictor: int = 1,
    values: bytes | None = None,
    tags: dict[int, tuple[int, list]] | None = None,
    lens: bool = True,
) -> bytes:
    file = Tiff(order, big)
    width, height = size
    file.tag(256, width, 4).tag(257, height, 4).tag(258, [bits] * samples).tag(259, CODECS[codec][0])
    if photometric is not None:
        file.tag(262, photometric)
    file.tag(277, samples)
    if fill != 1:
        file.tag(266, fill)
    if extra is not None:
        file.tag(338, list(extra))
    if sample_format is not None:
        file.tag(339, [sample_format] * samples)
    if predictor != 1:
        file.tag(317, predictor)
    if planar:
        file.tag(284, 2)
    if photometric == 3:
        file.tag(320, [DICE.randrange(65536) for _ in range(3 << bits)])
    if rows is not None:
        file.tag(278, rows, 4)
    places = (273, 279)
    if tile:
        places = (324, 325)
        file.tag(322, tile[0], 4).tag(323, tile[1], 4)
    for number, (kind, listed) in (tags or {}).items():
        file.tag(number, listed, kind)
    across, down = (tile or (width, rows or height))
    down = min(down, height) if not tile else down
    chunks = []
    for _ in range(samples if planar else 1):
        for top in range(0, height, down):
            for _ in range(0, width, across):
                count = down if tile else min(down, height - top)
                row = (across * bits * (1 if planar else samples) + 7) // 8
                data = values if values is not None else noise(row * count)
                data = CODECS[codec][1](data)
                chunks.append(turn_bits(data) if fill == 2 and codec != "none" else data)
    return file.build(chunks, places, lens)


def floats(order: str) -> bytes:
    numbers = [DICE.choice([DICE.uniform(-50, 300), DICE.random(), 254.99, 255.0, 255.5, -0.5]) for _ in range(13 * 7)]
    return struct.pack(f"{order}{13 * 7}f", *numbers)


def integers(order: str, kind: str) -> bytes:
    low = -400 if kind.islower() else 0
    numbers = [DICE.choice([DICE.randint(low, 400), DICE.randint(0, 255), 255, 256, 32767]) for _ in range(13 * 7)]
    return struct.pack(f"{order}{13 * 7}{kind}", *numbers)


def saved(picture: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, "TIFF", **options)
    return file.getvalue()


def strips_of(file: bytes) -> list[bytes]:
    with Image.open(io.BytesIO(file)) as opened:
        tags = opened.tag_v2
        return [file[at : at + length] for at, length in zip(tags[273], tags[279], strict=True)]


def smooth(mode: str, size: tuple[int, int] = (40, 24)) -> Image.Image:
    ramp = Image.linear_gradient("L")
    bands = [ramp, ramp.rotate(90), ramp.rotate(180)]
    return Image.merge("RGB", bands).resize(size).convert(mode)


def fax_files() -> dict[str, bytes]:
    files = {}
    bits = smooth("L", (45, 14)).convert("1")
    for name, options in {
        "rle": {"compression": "tiff_ccitt"},
        "g3-1d": {"compression": "group3"},
        "g3-2d": {"compression": "group3", "tiffinfo": {292: 1}},
        "g3-1d-aligned": {"compression": "group3", "tiffinfo": {292: 4}},
        "g3-2d-aligned": {"compression": "group3", "tiffinfo": {292: 5}},
        "g4": {"compression": "group4"},
    }.items():
        file = saved(bits, **options)
        codes = strips_of(file)
        number = {"rle": 2, "g3": 3, "g4": 4}[name[:3].rstrip("-")]
        for photometric, fill, rows in itertools.product((0, 1), (1, 2), (None, 2**32 - 1)):
            made = Tiff()
            made.tag(256, 45).tag(257, 14).tag(258, 1).tag(259, number).tag(262, photometric).tag(277, 1)
            if fill == 2:
                made.tag(266, 2)
            if rows:
                made.tag(278, rows, 4)
            if name.startswith("g3"):
                made.tag(292, {"1d": 0, "2d": 1}[name[3:5]] | (4 if "aligned" in name else 0), 4)
            end = "-max" if rows else ""
            files[f"{name}-p{photometric}-f{fill}{end}"] = made.build([turn_bits(c) if fill == 2 else c for c in codes])
        rows_files = [strips_of(saved(bits.crop((0, top, 45, top + 5)), **options)) for top in (0, 5)]
        rows_files.append(strips_of(saved(bits.crop((0, 10, 45, 14)), **options)))
        made = Tiff(">")
        made.tag(256, 45).tag(257, 14).tag(258, 1).tag(259, number).tag(262, 0).tag(277, 1).tag(278, 5)
        if name.startswith("g3"):
            made.tag(292, options.get("tiffinfo", {}).get(292, 0), 4)
        files[f"{name}-strips"] = made.build([codes[0] for codes in rows_files])
    return files


def tiffs() -> dict[str, bytes]:
    files = {}
    for (end, order), codec in itertools.product(ORDERS.items(), CODECS):
        base = {"order": order, "codec": codec}
        tail = f"{codec}-{end}"
        for photometric, bits, fill in itertools.product((0, 1, 3), (1, 2, 4, 8), (1, 2)):
            files[f"p{photometric}-{bits}-f{fill}-{tail}"] = tiff(photometric, bits, fill=fill, **base)
        for photometric, fill in itertools.product((0, 1), (1, 2)):
            files[f"p{photometric}-16-f{fill}-{tail}"] = tiff(photometric, 16, fill=fill, **base)
        for kind, bits in (("h", 16), ("i", 32), ("I", 32)):
            for photometric in (0, 1):
                form = 1 if kind == "I" else 2
                values = integers(order, kind)
                files[f"p{photometric}-int{bits}-{form}-{tail}"] = tiff(photometric, bits, sample_format=form, values=values, **base)
        for photometric in (0, 1):
            files[f"p{photometric}-float-{tail}"] = tiff(photometric, 32, sample_format=3, values=floats(order), **base)
            files[f"p{photometric}-int8-{tail}"] = tiff(photometric, 8, sample_format=2, **base)
        files[f"p1-12-{tail}"] = tiff(1, 12, **base)
        files[f"p1-float64-{tail}"] = tiff(1, 64, sample_format=3, **base)
        for extra in ((0,), (1,), (2,), None):
            name = "none" if extra is None else "".join(map(str, extra))
            for photometric in (0, 1, 3):
                files[f"p{photometric}-8x2-e{name}-{tail}"] = tiff(photometric, 8, 2, extra=extra, **base)
        for bits, extra in itertools.product(
            (8, 16), (None, (), (0,), (1,), (2,), (999,), (0, 0), (1, 0), (2, 0), (0, 0, 0), (1, 0, 0), (2, 0, 0))
        ):
            name = "none" if extra is None else "".join(map(str, extra)) or "3"
            samples = 4 if extra is None else 3 + len(extra)
            files[f"rgb-{bits}-e{name}-{tail}"] = tiff(2, bits, samples, extra=extra or None, **base)
            if codec in ("lzw", "deflate"):
                files[f"rgb-{bits}-e{name}-d-{tail}"] = tiff(2, bits, samples, extra=extra or None, predictor=2, **base)
            if len(extra or ()) < 2:
                files[f"rgb-{bits}-e{name}-planar-{tail}"] = tiff(2, bits, samples, extra=extra or None, planar=True, rows=3, **base)
        files[f"rgb-8-f2-{tail}"] = tiff(2, 8, 3, fill=2, **base)
        files[f"rgb-8-f2-planar-{tail}"] = tiff(2, 8, 3, fill=2, planar=True, **base)
        files[f"rgb-16-f2-{tail}"] = tiff(2, 16, 3, fill=2, **base)
        for bits, extra in ((8, None), (8, (0,)), (8, (0, 0)), (16, None), (8, (2,))):
            name = "".join(map(str, extra or ()))
            files[f"cmyk-{bits}-e{name}-{tail}"] = tiff(5, bits, 4 + len(extra or ()), extra=extra, **base)
        files[f"cmyk-8-planar-{tail}"] = tiff(5, 8, 4, planar=True, **base)
        for photometric, samples in ((1, 1), (2, 3), (2, 4), (5, 4), (1, 2), (3, 1)):
            extra = (2,) if samples == 2 else None
            name = f"p{photometric}x{samples}"
            files[f"{name}-tiles-{tail}"] = tiff(photometric, 8, samples, tile=(16, 16), size=(20, 18), extra=extra, **base)
            if samples > 1:
                files[f"{name}-tiles-planar-{tail}"] = tiff(
                    photometric, 8, samples, tile=(16, 16), size=(20, 18), extra=extra, planar=True, **base
                )
        files[f"p0-1-tiles-{tail}"] = tiff(0, 1, tile=(16, 16), size=(20, 18), **base)
        files[f"p1-4-tiles-{tail}"] = tiff(1, 4, tile=(16, 16), size=(37, 18), **base)
        files[f"p1-16-tiles-{tail}"] = tiff(1, 16, tile=(16, 16), size=(20, 18), **base)
        files[f"rgb-16-tiles-planar-{tail}"] = tiff(2, 16, 3, tile=(16, 16), size=(20, 18), planar=True, **base)
        for bits in (8, 16):
            if codec in ("lzw", "deflate"):
                files[f"p1-{bits}-d-{tail}"] = tiff(1, bits, predictor=2, rows=3, **base)
        if codec in ("lzw", "deflate"):
            files[f"p1-int32-d-{tail}"] = tiff(1, 32, sample_format=2, predictor=2, **base)
            files[f"p1-int16-d-{tail}"] = tiff(1, 16, sample_format=2, predictor=2, **base)
            files[f"p1-float-d3-{tail}"] = tiff(1, 32, sample_format=3, predictor=3, values=floats("<"), **base)
            files[f"p1-4-d-{tail}"] = tiff(1, 4, predictor=2, **base)
            files[f"rgb-8-planar-d-{tail}"] = tiff(2, 8, 3, predictor=2, planar=True, **base)
        else:
            files[f"p1-8-d-ignored-{tail}"] = tiff(1, 8, predictor=2, **base)
            files[f"p1-4-d-ignored-{tail}"] = tiff(1, 4, predictor=2, **base)
        for name, (across, down) in {"11": (1, 1), "21": (2, 1), "22": (2, 2)}.items():
            tags = {530: (3, [across, down])}
            data = noise((16 // across) * (8 // down) * (across * down + 2))
            files[f"ycc-{name}-{tail}"] = tiff(6, 8, 3, size=(16, 8), tags=tags, values=data, **base)
        files[f"ycc-default-{tail}"] = tiff(6, 8, 3, size=(16, 8), values=noise(16 * 8 * 3), **base)
        files[f"ycc-gray-{tail}"] = tiff(6, 8, 1, **base)
        files[f"lab-{tail}"] = tiff(8, 8, 3, **base)
        files[f"no-photometric-{tail}"] = tiff(None, 8, **base)
        files[f"no-lens-{tail}"] = tiff(1, 8, lens=False, **base)
        files[f"no-lens-strips-{tail}"] = tiff(1, 8, lens=False, rows=3, **base)
        files[f"short-palette-{tail}"] = tiff(3, 8, tags={320: (3, list(range(0, 60000, 5000)))}, **base)
        files[f"rows-max-{tail}"] = tiff(1, 8, rows=2**32 - 1, **base)
        files[f"rows-zero-{tail}"] = tiff(1, 8, tags={278: (4, [0])}, **base)
        files[f"bits-once-{tail}"] = tiff(2, 8, 3, tags={258: (3, [8])}, **base)
        files[f"bits-more-{tail}"] = tiff(1, 8, 1, tags={258: (3, [8, 8, 8])}, **base)
        files[f"bits-unequal-{tail}"] = tiff(2, 8, 3, tags={258: (3, [8, 8, 4])}, **base)
        files[f"big-{tail}"] = tiff(2, 8, 3, big=True, **base)
    for kind, values in {
        1: [6], 2: b"6\0", 3: [6], 4: [6], 5: [(12, 2)], 6: [6], 7: [6], 8: [6], 9: [6], 11: [6.0], 12: [6.0], 13: [6], 16: [6],
    }.items():
        files[f"turn-type{kind}"] = tiff(2, 8, 3, tags={274: (kind, values)})
    for turn in range(10):
        files[f"turn-{turn}"] = tiff(2, 8, 3, tags={274: (3, [turn])}, codec="lzw")
    files["turn-xmp"] = tiff(2, 8, 3, tags={700: (1, b'<x tiff:Orientation="6"/>')})
    for kind in (1, 4, 9, 8):
        files[f"size-type{kind}"] = tiff(1, 8, tags={256: (kind, [13]), 257: (kind, [7])})
    odd = tiff(1, 8)
    files["magic-odd-ii"] = odd[:2] + b"\0*" + odd[4:]
    odd = tiff(1, 8, order=">")
    files["magic-odd-mm"] = odd[:2] + b"*\0" + odd[4:]
    files |= fax_files()
    for mode in ("L", "RGB", "YCbCr", "CMYK"):
        picture = smooth(mode, (40, 24))
        files[f"jpeg-{mode.lower()}"] = saved(picture, compression="jpeg", quality=70)
        files[f"jpeg-{mode.lower()}-strips"] = saved(picture, compression="jpeg", quality=70, tiffinfo={278: 16})
    for mode in ("1", "L", "RGB", "RGBA", "LA", "CMYK", "I;16", "F", "I", "P"):
        picture = smooth("RGB", (17, 9)).convert(mode) if mode != "I;16" else Image.frombytes("I;16", (17, 9), noise(306))
        for codec in ("zstd", "tiff_lzw"):
            try:
                files[f"saved-{mode.replace(';', '')}-{codec}".lower()] = saved(picture, compression=codec)
            except (OSError, ValueError, KeyError) as error:
                print(mode, codec, error)
    return {f"tiff-{name}.tif": file for name, file in files.items()}


def gifs() -> dict[str, bytes]:
    """Frames without a palette, of the screen's size, smaller, and with a color that is transparent."""
    files = {}
    for name, place, options in (
        ("whole", None, {}),
        ("part", (3, 2), {}),
        ("part-key", (3, 2), {"transparency": 100}),
        ("screen0", (0, 0), {}),
    ):
        file = io.BytesIO()
        Image.frombytes("L", SIZE, noise(91)).save(file, "GIF", **options)
        data = bytearray(file.getvalue())
        palette_len = 3 << (data[10] & 7) + 1
        data[10] &= 0x7F
        del data[13 : 13 + palette_len]
        frame = 13
        while data[frame] == 0x21:
            frame += 2
            while data[frame]:
                frame += data[frame] + 1
            frame += 1
        if place:
            struct.pack_into("<HH", data, 6, *((20, 11) if name != "screen0" else (0, 0)))
            struct.pack_into("<HH", data, frame + 1, *place)
        if data[frame + 9] & 0x80:
            palette_len = 3 << (data[frame + 9] & 7) + 1
            data[frame + 9] &= 0x7F
            del data[frame + 10 : frame + 10 + palette_len]
        files[f"gif-no-palette-{name}.gif"] = bytes(data)
    return files


def one_of_each(files: dict[str, bytes]) -> dict[str, bytes]:
    pairs = [f"-{codec}-{end}.tif" for codec in CODECS for end in ORDERS]
    kinds: dict[str, list[str]] = {}
    for name in files:
        ends = [pair for pair in pairs if name.endswith(pair)]
        kinds.setdefault(name.removesuffix(ends[0]) if ends else name, []).append(name)
    kept = []
    for index, names in enumerate(kinds.values()):
        kept.append(names[index * 3 % len(names)])
        # Of these Pillow reads only half of the pairs right.
        if "float" in names[0] or "int" in names[0]:
            kept += [name for name in names if name.endswith(("-lzw-ii.tif", "-none-mm.tif"))]
    return {name: files[name] for name in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--one-of-each", action="store_true")
    parser.add_argument("dir", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    arguments.dir.mkdir(parents=True, exist_ok=True)
    files = bmps() | gifs() | tiffs()
    if arguments.one_of_each:
        files = one_of_each(files)
    for name, file in files.items():
        (arguments.dir / name).write_bytes(file)
    print(f"{len(files)} files, {sum(map(len, files.values()))} bytes")


if __name__ == "__main__":
    main()
