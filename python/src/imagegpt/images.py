"""Images in the forms that Python programs have them in, as the contract's images."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import numpy

from imagegpt.errors import InvalidImageError
from imagegpt.v1 import imagegpt_pb2 as pb

__all__ = ["ImageInput", "TensorLike", "to_message"]


class TensorLike(Protocol):
    """A torch tensor, which this package does not import."""

    def detach(self) -> Any:
        """Returns the tensor without its history."""


if TYPE_CHECKING:
    import PIL.Image
    from numpy.typing import NDArray

    #: Forms of an image: the path of an image file; the bytes of one; a Pillow
    #: image; an array of pixels (height, width, 3) of uint8, or of tokens
    #: (positions,) of integers; a torch tensor of pixels (3, height, width) or
    #: (height, width, 3) of uint8, or of tokens; a row ``{"bytes": …, "path": …}``
    #: of the ``datasets`` library; or a message of the contract.
    ImageInput: TypeAlias = (
        str
        | os.PathLike[str]
        | bytes
        | bytearray
        | memoryview
        | PIL.Image.Image
        | NDArray[Any]
        | TensorLike
        | Mapping[str, Any]
        | pb.Image
    )
else:
    ImageInput = object

# Modes of Pillow that a PNG file stores without loss, so that the worker reads
# the same pixels and applies `alpha` itself.
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGBA", "I;16"})
_FORMS = (
    "a path, the bytes of a file, a Pillow image, an array (height, width, 3) of uint8 or of "
    "tokens, a torch tensor, or a mapping with 'bytes' or 'path'"
)


class _Refused(Exception):
    """Reason for which a value is no image; the caller adds the image's id."""

    def __init__(self, text: str, code: str = "INVALID_ARGUMENT") -> None:
        super().__init__(text)
        self.code = code


def to_message(
    image: ImageInput, id: Hashable, bytes_max: int, message_max: int | None = None
) -> pb.Image:
    """Returns the image as the contract has it.

    Args:
        image: Image in any form of :data:`ImageInput`.
        id: Id or index that an error names.
        bytes_max: Largest size of an encoded image in bytes.
        message_max: Largest size in bytes of an image in any form. Default: no limit.

    Raises:
        InvalidImageError: The value is no image, or the file cannot be read. The code
            of a file that does not exist is NOT_FOUND, of one that may not be read
            PERMISSION_DENIED, as in the tables of ``imagegpt embed``.
    """
    try:
        message = _message(image, bytes_max)
        if message_max is not None and message.ByteSize() > message_max:
            raise _Refused(
                f"the image has {message.ByteSize()} bytes, more than the {message_max} of a "
                "request (--request-bytes-max)"
            )
        return message
    except _Refused as refused:
        error = InvalidImageError(id, refused.code, str(refused))
        raise error from refused.__cause__


def _message(image: ImageInput, bytes_max: int) -> pb.Image:
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _encoded(bytes(image) if len(image) <= bytes_max else image, bytes_max)
    if isinstance(image, (str, os.PathLike)):
        return _encoded(_read(image, bytes_max), bytes_max)
    if isinstance(image, numpy.ndarray):
        return _array(image, "array")
    if isinstance(image, pb.Image):
        return image
    if isinstance(image, Mapping):
        return _row(image, bytes_max)
    kind = f"{type(image).__module__}.{type(image).__qualname__}"
    if kind == "builtins.NoneType":
        raise _Refused("there is no image (None)")
    if kind.startswith("torch."):
        return _tensor(image)
    if _is_pillow(image):
        return _pillow(cast("PIL.Image.Image", image), bytes_max)
    raise _Refused(f"a {kind} is no image; give {_FORMS}")


def _encoded(content: bytes | bytearray | memoryview, bytes_max: int) -> pb.Image:
    if len(content) > bytes_max:
        raise _Refused(
            f"the file has {len(content)} bytes, more than the {bytes_max} that the worker takes "
            "(--image-bytes-max)"
        )
    if not content:
        raise _Refused("the file is empty")
    return pb.Image(encoded=bytes(content))


def _read(path: str | os.PathLike[str], bytes_max: int) -> bytes:
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            # A pipe, for instance, which would be waited for.
            code = "NOT_FOUND" if stat.S_ISDIR(mode) else "FAILED_PRECONDITION"
            raise _Refused(f"{path} cannot be read: no regular file", code)
        with open(path, "rb") as file:
            # Not a buffer of the largest size for a small file; one byte more shows
            # that the file is too large, whatever its size was before.
            size = os.fstat(file.fileno()).st_size
            return file.read(min(size, bytes_max) + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            if "://" in os.fspath(path):
                raise _Refused(f"{path} is a URL, and only files are read; give bytes") from error
            raise _Refused(f"{path} cannot be read: {reason}", "NOT_FOUND") from error
        code = "PERMISSION_DENIED" if isinstance(error, PermissionError) else "INVALID_ARGUMENT"
        raise _Refused(f"{path} cannot be read: {reason}", code) from error


def _row(row: Mapping[str, Any], bytes_max: int) -> pb.Image:
    content, path = row.get("bytes"), row.get("path")
    if content is not None:
        if not isinstance(content, (bytes, bytearray, memoryview)):
            raise _Refused(f"'bytes' of the row are a {type(content).__name__}")
        return _message(content, bytes_max)
    if isinstance(path, (str, os.PathLike)) and os.fspath(path):
        return _message(path, bytes_max)
    raise _Refused(f"the row with {sorted(map(str, row))} has neither 'bytes' nor 'path'")


def _array(array: NDArray[Any], kind: str) -> pb.Image:
    shape = tuple(array.shape)
    if array.ndim == 1 and array.dtype.kind in "iu":
        return _tokens(array)
    if array.ndim == 3 and shape[2] == 3 and array.dtype == numpy.uint8:
        if 0 in shape:
            raise _Refused(f"the {kind} of shape {shape} has no pixels")
        return pb.Image(
            rgb8=pb.RawImage(width=shape[1], height=shape[0], pixels=array.tobytes(order="C"))
        )
    if array.ndim == 3 and shape[2] == 3 and array.dtype.kind == "f":
        raise _Refused(
            f"the {kind} has elements of {array.dtype}; pixels are uint8 from 0 to 255, so "
            "multiply by their scale, round and convert"
        )
    raise _Refused(
        f"the {kind} of shape {shape} and {array.dtype} is neither pixels, (height, width, 3) of "
        "uint8, nor tokens, (positions,) of integers"
    )


def _tokens(array: NDArray[Any]) -> pb.Image:
    if array.size and (int(array.min()) < 0 or int(array.max()) >= 1 << 32):
        raise _Refused(f"tokens from {array.min()} to {array.max()} are not all palette indices")
    return pb.Image(tokens=pb.Tokens(ids=array.tolist()))


def _tensor(tensor: Any) -> pb.Image:
    try:
        array = numpy.asarray(tensor.detach().cpu().numpy())
    except (AttributeError, TypeError, RuntimeError) as error:
        raise _Refused(f"the tensor cannot be read: {error}") from error
    # Torch has the channels first; a tensor that could be either is read so.
    if array.ndim == 3 and array.shape[0] == 3:
        array = numpy.moveaxis(array, 0, 2)
    return _array(array, "tensor")


def _is_pillow(image: Any) -> bool:
    try:
        import PIL.Image
    except ImportError:
        return False
    return isinstance(image, PIL.Image.Image)


def _storable(image: PIL.Image.Image) -> PIL.Image.Image:
    """Returns an image of a mode that keeps what the worker looks at: transparency,
    and all bits of gray."""
    import PIL.Image

    if image.mode in ("I;16B", "I;16L", "I;16N"):
        return PIL.Image.fromarray(numpy.asarray(image).astype("<u2"))
    with_alpha = {"RGBa": "RGBA", "La": "LA", "PA": "RGBA"}.get(image.mode)
    return image if with_alpha is None else image.convert(with_alpha)


def _pillow(image: PIL.Image.Image, bytes_max: int) -> pb.Image:
    import PIL.Image
    import PIL.ImageOps

    try:
        # As transformers' load_image does: first the orientation, then colors.
        image = PIL.ImageOps.exif_transpose(image)
        image = _storable(image)
        is_plain = image.mode == "RGB" and "transparency" not in image.info
        if not is_plain and image.mode not in _PNG_MODES and image.mode != "RGB":
            image, is_plain = image.convert("RGB"), True
        if is_plain and image.width * image.height * 3 <= bytes_max:
            pixels = image.tobytes()
            return pb.Image(rgb8=pb.RawImage(width=image.width, height=image.height, pixels=pixels))
        file = io.BytesIO()
        # Without its color profile and other metadata, which would not change
        # the pixels.
        info = {key: image.info[key] for key in ("transparency",) if key in image.info}
        image.save(file, "PNG", compress_level=1, icc_profile=None, exif=b"", **info)
    except (OSError, ValueError, SyntaxError, MemoryError) as error:
        raise _Refused(f"Pillow cannot read the image: {error}") from error
    return _encoded(file.getvalue(), bytes_max)
