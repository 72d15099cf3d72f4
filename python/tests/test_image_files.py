"""Codes of image files that cannot be read."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from imagegpt import InvalidImageError
from imagegpt.images import to_message


def refused(image: object) -> InvalidImageError:
    """Returns the error of a value that is no image, within seconds."""
    found: list[InvalidImageError] = []

    def convert() -> None:
        try:
            to_message(image, "a", 1 << 20)  # type: ignore[arg-type]
        except InvalidImageError as error:
            found.append(error)

    thread = threading.Thread(target=convert, daemon=True)
    thread.start()
    thread.join(10.0)
    assert found, f"{image!r} is waited for, or is taken as an image"
    return found[0]


def test_a_file_that_does_not_exist_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for path in (tmp_path / "none.png", tmp_path / "file" / "below.png", tmp_path):
        error = refused(path)
        assert error.code == "NOT_FOUND"
        assert str(path) in error.message
    assert refused({"bytes": None, "path": str(tmp_path / "none.png")}).code == "NOT_FOUND"


def test_a_file_without_permission_is_denied(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"x")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file")
    assert refused(path).code == "PERMISSION_DENIED"


def test_a_pipe_is_an_error_and_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "pipe.png"
    os.mkfifo(path)
    assert refused(path).code == "FAILED_PRECONDITION"


def test_a_url_and_nothing_are_named() -> None:
    error = refused("s3://bucket/a.png")
    assert error.code == "INVALID_ARGUMENT"
    assert error.message == "s3://bucket/a.png is a URL, and only files are read; give bytes"
    assert refused(None).message == "there is no image (None)"
