"""ImageGPT features, class scores, likelihoods and generated images.

A :class:`Client` calls workers that run elsewhere, a :class:`LocalWorker` starts one
on this machine and is its client::

    from imagegpt import LocalWorker
    with LocalWorker("models/emoji") as worker:
        vectors = worker.embed(["rooster.png"])

:class:`AsyncClient` is for asyncio programs. Adapters are in
:mod:`imagegpt.sklearn`, :mod:`imagegpt.datasets`, :mod:`imagegpt.ray` and
:mod:`imagegpt.spark`.
"""

from importlib.metadata import PackageNotFoundError, version

from imagegpt.aio import AsyncClient
from imagegpt.client import Client
from imagegpt.errors import (
    ClosedError,
    DeadlineExceededError,
    ForkError,
    ImageError,
    ImageGptError,
    InternalError,
    InvalidImageError,
    InvalidRequestError,
    ModelMismatchError,
    NotFoundError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
    WorkerError,
    WorkerStartError,
)
from imagegpt.images import ImageInput
from imagegpt.results import (
    Classification,
    ClassScore,
    GeneratedImage,
    Head,
    Limits,
    ModelInfo,
    Score,
)
from imagegpt.worker import LocalWorker, find_program

try:
    __version__ = version("imagegpt")
except PackageNotFoundError:  # The source directory, which is not installed.
    __version__ = "0"

__all__ = [
    "AsyncClient",
    "ClassScore",
    "Classification",
    "Client",
    "ClosedError",
    "DeadlineExceededError",
    "ForkError",
    "GeneratedImage",
    "Head",
    "ImageError",
    "ImageGptError",
    "ImageInput",
    "InternalError",
    "InvalidImageError",
    "InvalidRequestError",
    "Limits",
    "LocalWorker",
    "ModelInfo",
    "ModelMismatchError",
    "NotFoundError",
    "ResourceExhaustedError",
    "Score",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "WorkerError",
    "WorkerStartError",
    "__version__",
    "find_program",
]
