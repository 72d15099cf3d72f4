"""Every form of an image gives the tokens of the file that it was made from."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path
from typing import Any

import numpy
import PIL.Image
import pytest

from imagegpt import InvalidImageError, LocalWorker
from imagegpt.images import to_message

LIMIT = 32 << 20


def test_all_forms_of_a_picture_have_its_tokens(emoji: LocalWorker, pictures: list[Path]) -> None:
    path = pictures[0]
    content = path.read_bytes()
    image = PIL.Image.open(path)
    pixels = numpy.asarray(image.convert("RGB"))
    tokens = emoji.tokenize([path])[0]
    assert tokens.dtype == numpy.uint16
    forms: list[Any] = [
        str(path),
        content,
        bytearray(content),
        memoryview(content),
        image,
        pixels,
        pixels[:, ::-1][:, ::-1],
        numpy.asfortranarray(pixels),
        tokens,
        tokens.astype(numpy.int64),
        {"bytes": content, "path": None},
        {"bytes": None, "path": str(path)},
        {"bytes": content, "path": "no/such/file.png"},
    ]
    for got in emoji.tokenize(forms):
        numpy.testing.assert_array_equal(got, tokens)
    stacked = numpy.stack([pixels, pixels])
    numpy.testing.assert_array_equal(emoji.tokenize(stacked), [tokens, tokens])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
@pytest.mark.parametrize("alpha", ["drop", "white"])
def test_pillow_images_of_every_mode_are_what_convert_says(
    emoji: LocalWorker, mode: str, alpha: Any
) -> None:
    random = numpy.random.default_rng(7)
    noise = random.integers(0, 256, (40, 56, 4), numpy.uint8)
    image = PIL.Image.fromarray(noise, "RGBA").convert("RGB" if mode == "HSV" else mode)
    image = image.convert(mode)
    reference = image.convert("RGB")
    if alpha == "white" and image.has_transparency_data:
        white = PIL.Image.new("RGBA", image.size, "white")
        reference = PIL.Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    got, wanted = emoji.tokenize([image, numpy.asarray(reference)], alpha=alpha)
    numpy.testing.assert_array_equal(got, wanted)


def test_modes_of_pillow_that_png_lacks_keep_gray_and_transparency(emoji: LocalWorker) -> None:
    random = numpy.random.default_rng(5)
    gray = PIL.Image.fromarray(random.integers(0, 65536, (40, 40), numpy.uint16).astype(">u2"))
    assert gray.mode == "I;16B"
    file = io.BytesIO()
    gray.save(file, "TIFF")
    by_file, by_pillow = emoji.tokenize([file.getvalue(), gray])
    numpy.testing.assert_array_equal(by_file, by_pillow)
    noise = PIL.Image.fromarray(random.integers(0, 256, (40, 40, 4), numpy.uint8), "RGBA")
    premultiplied = noise.convert("RGBa")
    got, wanted = emoji.tokenize([premultiplied, premultiplied.convert("RGBA")], alpha="white")
    numpy.testing.assert_array_equal(got, wanted)


def test_the_orientation_of_a_photograph_is_applied_once(emoji: LocalWorker) -> None:
    random = numpy.random.default_rng(3)
    image = PIL.Image.fromarray(random.integers(0, 256, (30, 50, 3), numpy.uint8))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    opened = PIL.Image.open(io.BytesIO(file.getvalue()))
    by_file, by_pillow = emoji.tokenize([file.getvalue(), opened])
    numpy.testing.assert_array_equal(by_file, by_pillow)


def test_a_palette_with_transparency_is_the_workers_to_composite(emoji: LocalWorker) -> None:
    image = PIL.Image.new("P", (32, 32), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.info["transparency"] = 1
    red, white = emoji.tokenize([image], alpha="drop"), emoji.tokenize([image], alpha="white")
    blank = numpy.full((32, 32, 3), 255, numpy.uint8)
    numpy.testing.assert_array_equal(white, emoji.tokenize([blank]))
    assert (red != white).all()


class _Tensor:
    """What this package uses of a torch tensor."""

    def __init__(self, array: numpy.ndarray[Any, Any]) -> None:
        self.array = array

    def detach(self) -> _Tensor:
        return self

    def cpu(self) -> _Tensor:
        return self

    def numpy(self) -> numpy.ndarray[Any, Any]:
        return self.array


_Tensor.__module__ = "torch"


def test_a_tensor_has_its_channels_first_or_last() -> None:
    pixels = numpy.arange(4 * 5 * 3, dtype=numpy.uint8).reshape(4, 5, 3)
    for array in (pixels, numpy.moveaxis(pixels, 2, 0)):
        raw = to_message(_Tensor(array), 0, LIMIT).rgb8
        assert (raw.width, raw.height) == (5, 4)
        assert raw.pixels == pixels.tobytes()
    # Both ends are 3: torch's order.
    square = numpy.arange(27, dtype=numpy.uint8).reshape(3, 3, 3)
    assert (
        to_message(_Tensor(square), 0, LIMIT).rgb8.pixels == numpy.moveaxis(square, 0, 2).tobytes()
    )


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "no image \\(None\\)"),
        (7, "int is no image"),
        ([1, 2, 3], "list is no image"),
        ("no/such/file.png", "No such file"),
        ("/", "cannot be read"),
        ("null\0byte", "cannot be read"),
        (b"", "empty"),
        (b"x" * 100, "--image-bytes-max"),
        (memoryview(b"x" * 100), "--image-bytes-max"),
        (numpy.zeros((4, 4, 3)), "float64"),
        (numpy.zeros((4, 4), numpy.uint8), r"\(4, 4\)"),
        (numpy.zeros((4, 4, 4), numpy.uint8), r"\(4, 4, 4\)"),
        (numpy.zeros((0, 4, 3), numpy.uint8), "no pixels"),
        (numpy.zeros((3, 4, 4), numpy.uint8), r"\(3, 4, 4\)"),
        (numpy.zeros(4), "tokens"),
        (numpy.array([-1, 2]), "palette"),
        (numpy.array(["a"]), "neither"),
        (numpy.array(5), "neither"),
        ({}, "neither 'bytes' nor 'path'"),
        ({"bytes": None, "path": None}, "neither"),
        ({"bytes": "text"}, "str"),
        (_Tensor(numpy.zeros((3, 4, 4))), "float64"),
    ],
)
def test_what_is_no_image_says_why(value: object, words: str) -> None:
    with pytest.raises(InvalidImageError, match=words) as caught:
        to_message(value, "the id", 64)
    assert "'the id'" in str(caught.value)


def test_a_damaged_file_in_pillow_is_an_error_of_the_image() -> None:
    file = io.BytesIO()
    PIL.Image.new("RGB", (64, 64)).save(file, "PNG")
    opened = PIL.Image.open(io.BytesIO(file.getvalue()[:-30]))
    with pytest.raises(InvalidImageError, match="Pillow"):
        to_message(opened, 0, LIMIT)


def test_torch_is_not_imported() -> None:
    assert isinstance(sys.modules.get("torch", types.ModuleType("torch")), types.ModuleType)
    assert not any(name.startswith("torch.") for name in sys.modules)
