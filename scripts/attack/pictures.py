"""Hostile pictures, one per function: their headers claim far more than the files hold."""

import io
import struct
import zlib

from PIL import Image

Image.MAX_IMAGE_PIXELS = None
MIB = 1 << 20
DATA = object()


def zeros(n_bytes):
    """Returns `n_bytes` zeros as a zlib stream, quickly: an independent block of 1 MiB is repeated."""
    packer = zlib.compressobj(9, wbits=-15)
    block = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    packer = zlib.compressobj(9, wbits=-15)
    rest = packer.compress(bytes(n_bytes % MIB)) + packer.flush()
    checksum = (n_bytes % 65521) << 16 | 1
    return b"\x78\xda" + block * (n_bytes // MIB) + rest + checksum.to_bytes(4, "big")


def saved(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def tiff(data, **tags):
    """Returns a little-endian TIFF of one image; DATA stands for the offset at which the data begins."""
    numbers = {
        "width": 256, "length": 257, "bits": 258, "compression": 259, "photometric": 262, "strips": 273,
        "samples": 277, "rows_per_strip": 278, "strip_bytes": 279, "tile_width": 322, "tile_length": 323,
        "tiles": 324, "tile_bytes": 325, "extra": 338,
    }  # fmt: skip
    entries = sorted((numbers[name], value if isinstance(value, list) else [value]) for name, value in tags.items())
    tail_at = 8 + 2 + 12 * len(entries) + 4
    # All tags are LONG, which readers accept for SHORT; only the many extra samples are SHORT, to keep the file small.
    kinds = {number: (3, "H") if number == numbers["extra"] else (4, "I") for number, _ in entries}
    sizes = {number: len(values) * struct.calcsize(kinds[number][1]) for number, values in entries}
    data_at = tail_at + sum(size for size in sizes.values() if size > 4)
    head, tail = struct.pack("<2sHIH", b"II", 42, 8, len(entries)), b""
    for number, values in entries:
        kind, letter = kinds[number]
        packed = struct.pack(f"<{len(values)}{letter}", *(data_at if value is DATA else value for value in values))
        outside = sizes[number] > 4
        place = struct.pack("<I", tail_at + len(tail)) if outside else packed.ljust(4, b"\0")
        head += struct.pack("<HHI", number, kind, len(values)) + place
        tail += packed if outside else b""
    return head + bytes(4) + tail + data


def tiled(width, length, tile_width, tile_length, n_tiles, data, samples=1, compression=8):
    return tiff(
        data,
        width=width, length=length, bits=8, compression=compression, photometric=1 if samples == 1 else 2,
        samples=samples, tile_width=tile_width, tile_length=tile_length, tiles=[DATA] * n_tiles,
        tile_bytes=[len(data)] * n_tiles, **({"extra": [0] * (samples - 3)} if samples > 3 else {}),
    )  # fmt: skip


def strips(width, n_strips, data, compression):
    return tiff(
        data,
        width=width, length=n_strips, bits=8, compression=compression, photometric=1, samples=1, rows_per_strip=1,
        strips=[DATA] * n_strips, strip_bytes=[len(data)] * n_strips,
    )  # fmt: skip


def tiff_tile():
    """A TIFF of 284 bytes, in whose only tile a row is larger than any memory: a failed allocation ends the process."""
    return tiled(16, 16, (1 << 32) - 16, 16, 1, b"x" * 16, samples=64)


def sized_jpeg(width, height):
    """A gray JPEG of 16x16 whose frame header claims another size."""
    data = bytearray(saved(Image.new("L", (16, 16), 99), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, color, rows, extra=b""):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def png_of_zeros(width, height, color=6):
    return png(width, height, color, zeros(height * (1 + width * {0: 1, 2: 3, 6: 4}[color])))


def png_metadata(n_bytes):
    """A PNG of 8x8 whose text and profile inflate to n_bytes each."""
    bomb = zeros(n_bytes)
    extra = png_chunk(b"iCCP", b"p\0\0" + bomb) + png_chunk(b"zTXt", b"k\0\0" + bomb)
    extra += png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb)
    return png(8, 8, 2, zeros(8 * 25), extra)


def jpeg_scans(width, height, n_scans):
    """A progressive gray JPEG with `n_scans` scans over all blocks, each a few bytes long: runs of 32767 empty blocks."""

    def segment(marker, body):
        return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body

    def scan(first, last, high, low, bits):
        packed = int(bits.ljust(-(-len(bits) // 8) * 8, "1"), 2).to_bytes(-(-len(bits) // 8), "big")
        return segment(0xDA, bytes([1, 1, 0, first, last, high << 4 | low])) + packed.replace(b"\xff", b"\xff\0")

    n_blocks = -(-width // 8) * -(-height // 8)
    empty = ("0" + "1" * 14) * -(-n_blocks // 32767)
    one_code = bytes([1]) + bytes(15)
    parts = [
        b"\xff\xd8",
        segment(0xDB, b"\0" + b"\1" * 64),
        segment(0xC2, struct.pack(">BHHB", 8, height, width, 1) + bytes([1, 0x11, 0])),
        segment(0xC4, b"\x00" + one_code + b"\x00"),
        segment(0xC4, b"\x10" + one_code + b"\xe0"),
        scan(0, 0, 0, 0, "0" * n_blocks),
        scan(1, 63, 0, 13, empty),
    ]
    again = [scan(1, 63, high, high - 1, empty) for high in range(13, 0, -1)]
    parts += [again[idx % len(again)] for idx in range(n_scans)]
    return b"".join(parts) + b"\xff\xd9"


def webp_hidden(side):
    """A WebP whose header says 64x64, with an invalid animation frame followed by a picture of side x side."""
    picture = saved(Image.new("RGB", (side, side), (1, 2, 3)), "WEBP", quality=1, method=0)[12:]
    canvas = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (63).to_bytes(3, "little") * 2
    frame = b"ANMF" + struct.pack("<I", 24) + bytes(16) + b"JUNK" + struct.pack("<I", 0x7FFFFFF0)
    body = b"WEBP" + canvas + frame + picture
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif(screen, frame):
    data = bytearray(saved(Image.new("P", (frame, frame)), "GIF"))
    data[6:10] = struct.pack("<HH", screen, screen)
    return bytes(data)


def bmp(width, height):
    """A run-length encoded BMP that ends before its first pixel."""
    palette, data = bytes(4 * 256), b"\0\1"
    start = 54 + len(palette)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + info + palette + data


def small_png(seed, side=32):
    """A valid picture, different for each seed."""
    pixels = bytes((seed * 37 + x * 5 + y * 11 + 80 * c) % 256 for y in range(side) for x in range(side) for c in range(3))
    return saved(Image.frombytes("RGB", (side, side), pixels), "PNG")


def hog(side=8000):
    """A PNG at the pixel limit that is small on the wire and slow to decode."""
    return png_of_zeros(side, side)
