"""Exceptions of this package.

Every exception is an :class:`ImageGptError`. An exception of one image is an
:class:`ImageError`, which names the image; an exception of a whole call is a
:class:`WorkerError`, which names the images that have no answer.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

__all__ = [
    "ClosedError",
    "DeadlineExceededError",
    "ForkError",
    "ImageError",
    "ImageGptError",
    "InternalError",
    "InvalidImageError",
    "InvalidRequestError",
    "ModelMismatchError",
    "NotFoundError",
    "ResourceExhaustedError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "WorkerError",
    "WorkerStartError",
]

# Ids that an error's text names; `items` has all of them.
_NAMED_MAX = 4


class ImageGptError(Exception):
    """Base of all exceptions of this package."""


class ClosedError(ImageGptError):
    """Use of a client after its ``close``."""


class ForkError(ImageGptError):
    """Use of a client in a process that was forked during calls of its parent."""


class ImageError(ImageGptError):
    """Failure of one image, whose neighbors are not affected.

    Attributes:
        id: The image's id in a stream, or its index in a call.
        code: Name of the gRPC code, such as ``"INTERNAL"``.
        message: Reason, without the id and the code.
    """

    def __init__(self, id: Hashable, code: str, message: str) -> None:
        super().__init__(id, code, message)
        self.id = id
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"image {self.id!r}: {self.code}: {self.message}"


class InvalidImageError(ImageError, ValueError):
    """Image that cannot be used: no image, damaged, too large, or an array of a
    wrong shape or type. Another try gives the same error."""


class WorkerError(ImageGptError):
    """Failure of a whole call.

    Attributes:
        code: Name of the gRPC code, such as ``"UNAVAILABLE"``.
        message: Reason, without the code and the ids.
        items: Ids or indices of the images that have no answer; empty if the
            call has no images.
        reason: The worker's reason in upper case, such as ``"DRAINING"``
            (``google.rpc.ErrorInfo``); ``None`` if the worker did not give one.
        retry_after: Seconds after which the worker asks for another try
            (``google.rpc.RetryInfo``); ``None`` if it does not ask.
        request_id: The call's ``x-request-id``, under which the worker's log
            has the cause; ``None`` if the call did not reach a worker.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        items: Sequence[Hashable] = (),
        reason: str | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.items = items
        self.reason = reason
        self.retry_after = retry_after
        self.request_id = request_id

    def __str__(self) -> str:
        text = f"{self.code}: {self.message}"
        if not self.items:
            return text
        named = ", ".join(repr(item) for item in self.items[:_NAMED_MAX])
        more = len(self.items) - _NAMED_MAX
        return f"{text} (no answer for {named}{f' and {more} more' if more > 0 else ''})"


class InvalidRequestError(WorkerError, ValueError):
    """Option that the model cannot serve, or a call that is malformed."""


class ResourceExhaustedError(WorkerError):
    """Worker that stayed full for as long as the call was repeated, or a message
    over the worker's limit."""


class DeadlineExceededError(WorkerError, TimeoutError):
    """Call that was not answered within its timeout."""


class UnavailableError(WorkerError):
    """No worker that answers: none is reachable, or all are loading, draining or
    failed."""


class UnauthenticatedError(WorkerError):
    """Call without a bearer token that the worker accepts."""


class UnimplementedError(WorkerError):
    """Task that the worker's model does not have."""


class NotFoundError(WorkerError):
    """Linear head that the worker does not have."""


class InternalError(WorkerError):
    """Fault within the worker; its log has the cause under the request id."""


class ModelMismatchError(WorkerError):
    """Worker that serves another model than the one that was asked for or that
    answered before. Vectors of different models cannot be compared."""


class WorkerStartError(ImageGptError):
    """Local worker that did not become ready.

    Attributes:
        exit_code: Exit code of the process; ``None`` if it was still running.
        log: Last lines of the worker's log.
    """

    def __init__(self, message: str, exit_code: int | None, log: Sequence[str]) -> None:
        super().__init__(message, exit_code, log)
        self.message = message
        self.exit_code = exit_code
        self.log = log

    def __str__(self) -> str:
        return "\n  ".join([self.message, *self.log])


_BY_CODE: dict[str, type[WorkerError]] = {
    "INVALID_ARGUMENT": InvalidRequestError,
    "OUT_OF_RANGE": InvalidRequestError,
    "FAILED_PRECONDITION": InvalidRequestError,
    "RESOURCE_EXHAUSTED": ResourceExhaustedError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "UNAVAILABLE": UnavailableError,
    "UNAUTHENTICATED": UnauthenticatedError,
    "UNIMPLEMENTED": UnimplementedError,
    "NOT_FOUND": NotFoundError,
    "INTERNAL": InternalError,
    "DATA_LOSS": InternalError,
    "UNKNOWN": InternalError,
}

# Codes of an image that another try cannot change.
_LASTING = frozenset({"INVALID_ARGUMENT", "OUT_OF_RANGE", "FAILED_PRECONDITION"})


def worker_error_class(code: str) -> type[WorkerError]:
    """Returns the class of a call's failure with this gRPC code."""
    return _BY_CODE.get(code, WorkerError)


def image_error(id: Hashable, code: str, message: str) -> ImageError:
    """Returns the error of an image with this gRPC code."""
    kind = InvalidImageError if code in _LASTING else ImageError
    return kind(id, code, message)
