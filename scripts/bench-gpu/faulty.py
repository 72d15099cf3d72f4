"""A model that reads an illegal address on a GPU, and a picture that makes it do so."""

import struct
import zlib
from array import array
from pathlib import Path

SIDE = 32


def png(path: Path) -> None:
    """Writes a white picture."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    rows = (b"\0" + b"\xff" * (3 * SIDE)) * SIDE
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


# A graph in the wire format of protocol buffers, field by field.


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value & (2**64 - 1))


def piece(field: int, content: bytes | str) -> bytes:
    content = content.encode() if isinstance(content, str) else content
    return varint(field << 3 | 2) + varint(len(content)) + content


FLOAT, INT64 = 1, 7


def tensor(name: str, kind: int, dims: list[int], raw: bytes) -> bytes:
    shape = b"".join(number(1, size) for size in dims)
    return shape + number(2, kind) + piece(8, name) + piece(9, raw)


def node(operator: str, inputs: list[str], output: str, **integers: int) -> bytes:
    attributes = b"".join(
        piece(5, piece(1, name) + number(3, value) + number(20, 2))
        for name, value in integers.items()
    )
    names = b"".join(piece(1, name) for name in inputs)
    return names + piece(2, output) + piece(3, output) + piece(4, operator) + attributes


def value(name: str, kind: int, dims: list) -> bytes:
    shape = b"".join(
        piece(1, piece(2, size) if isinstance(size, str) else number(1, size)) for size in dims
    )
    return piece(1, name) + piece(2, piece(1, number(1, kind) + piece(2, shape)))


def graph() -> bytes:
    """Returns a graph that reads far beyond a tensor for images without the token 0.

    The images of a warm-up and of idle checks have every token. A CPU refuses the index; a GPU
    reads the address.
    """
    width, vocabulary, positions = 4, 513, 1024
    table = array("f", (0.01 * (idx % 97) for idx in range(vocabulary * width))).tobytes()
    places = array("f", (0.001 * (idx % 89) for idx in range(positions * width))).tobytes()
    nodes = [
        node("Gather", ["wte", "input_ids"], "embedded"),
        node("Add", ["embedded", "wpe"], "states"),
        node("Cast", ["input_ids"], "numbers", to=FLOAT),
        node("ReduceMin", ["numbers", "one_axis"], "least", keepdims=1),
        node("Greater", ["least", "half"], "is_without"),
        node("Cast", ["is_without"], "flag", to=INT64),
        node("Mul", ["flag", "far"], "index"),
        node("Unsqueeze", ["index", "one_axis"], "indices"),
        node("GatherElements", ["states", "indices"], "read", axis=1),
        node("Mul", ["read", "nothing"], "unread"),
        node("Add", ["states", "unread"], "last_hidden_state"),
    ]
    initializers = [
        tensor("wte", FLOAT, [vocabulary, width], table),
        tensor("wpe", FLOAT, [positions, width], places),
        tensor("one_axis", INT64, [1], struct.pack("<q", 1)),
        tensor("half", FLOAT, [1], struct.pack("<f", 0.5)),
        tensor("far", INT64, [1], struct.pack("<q", 1 << 44)),
        tensor("nothing", FLOAT, [1], struct.pack("<f", 0.0)),
    ]
    body = b"".join(piece(1, one) for one in nodes) + piece(2, "fault")
    body += b"".join(piece(5, one) for one in initializers)
    body += piece(11, value("input_ids", INT64, ["batch", positions]))
    body += piece(12, value("last_hidden_state", FLOAT, ["batch", positions, width]))
    opset = piece(1, "") + number(2, 18)
    return number(1, 9) + piece(7, body) + piece(8, opset)
