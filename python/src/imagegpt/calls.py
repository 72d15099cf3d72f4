"""Calls with one answer: which worker gets them, and when they are repeated."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import weakref
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from imagegpt.endpoints import ConnectOptions, Endpoint
from imagegpt.errors import ClosedError, WorkerError, worker_error_class
from imagegpt.options import PRIORITIES, Priority, chosen
from imagegpt.v1 import imagegpt_pb2_grpc

__all__ = ["Connections", "Failure", "Patience", "backoff", "code_name"]

log = logging.getLogger("imagegpt")

# Longest time, in seconds, for which a call is repeated while no worker answers.
# A worker that restarts with its model in the cache is back within it.
UNAVAILABLE_PATIENCE = 10.0
# Shortest and longest wait before a call that a full worker rejected is repeated.
RETRY_MIN, RETRY_MAX = 0.005, 30.0
# First and longest wait before another try after a failure without a wait of the
# worker's.
BACKOFF_MIN, BACKOFF_MAX = 0.05, 5.0

_CODE_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}

_R = TypeVar("_R")


def code_name(number: int) -> str:
    """Returns the name of a gRPC code, as a status within a message has it."""
    return _CODE_NAMES.get(number, "UNKNOWN")


def backoff() -> Iterator[float]:
    """Yields waits in seconds that double, each spread over its upper half so that
    the clients of one worker do not all return at the same time."""
    bound = BACKOFF_MIN
    while True:
        yield bound * random.uniform(1.0, 2.0)
        bound = min(bound * 2, BACKOFF_MAX)


@dataclass(frozen=True)
class Failure:
    """A failed call, as its status and the details of it say."""

    code: str
    message: str
    reason: str | None = None
    retry_after: float | None = None
    request_id: str | None = None

    @staticmethod
    def of(error: grpc.aio.AioRpcError) -> Failure:
        """Reads a status."""
        reason: str | None = None
        retry_after: float | None = None
        request_id: str | None = None
        for metadata in (error.initial_metadata(), error.trailing_metadata()):
            for key, value in metadata or ():
                if key == "x-request-id":
                    request_id = str(value)
                elif key == "grpc-status-details-bin":
                    reason, retry_after = _details(value)
        code = error.code()
        return Failure(
            code=code.name,
            message=error.details() or "the call failed without a message",
            reason=reason,
            retry_after=retry_after,
            request_id=request_id,
        )

    def error(self, items: Sequence[Hashable] = (), where: str = "") -> WorkerError:
        """Returns the exception for this failure."""
        kind = worker_error_class(self.code)
        return kind(
            self.code,
            f"{self.message}{f' ({where})' if where else ''}",
            items=items,
            reason=self.reason,
            retry_after=self.retry_after,
            request_id=self.request_id,
        )


def _details(content: Any) -> tuple[str | None, float | None]:
    reason: str | None = None
    retry_after: float | None = None
    try:
        status = status_pb2.Status.FromString(content)
        for detail in status.details:
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Unpack(info):
                reason = info.reason
            elif detail.Unpack(retry):
                retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    except (TypeError, ValueError):  # DecodeError is a ValueError
        log.debug("the details of a status cannot be read")
    return reason, retry_after


class Patience:
    """Decides whether and when a failed call is repeated."""

    def __init__(self, begun: float, timeout: float | None) -> None:
        self._deadline = None if timeout is None else begun + timeout
        self._waits = backoff()
        self._unavailable_since: float | None = None

    def left(self, now: float) -> float | None:
        """Returns the seconds until the deadline; ``None`` without one."""
        return None if self._deadline is None else max(0.0, self._deadline - now)

    def wait(self, failure: Failure, now: float) -> float | None:
        """Returns the seconds until the next try; ``None`` if there is none."""
        if failure.code == "UNAVAILABLE":
            since = self._unavailable_since
            if since is None:
                since = self._unavailable_since = now
            wait = next(self._waits)
            if now + wait > since + UNAVAILABLE_PATIENCE:
                return None
        elif failure.code == "RESOURCE_EXHAUSTED" and failure.retry_after is not None:
            self._unavailable_since = None
            wait = min(max(failure.retry_after, RETRY_MIN), RETRY_MAX)
        else:
            # RESOURCE_EXHAUSTED without a wait means that the call itself is too
            # large, now and later.
            return None
        left = self.left(now)
        return wait if left is None or wait < left else None


class Connections:
    """Channels of a client, one for each endpoint, opened when they are needed."""

    #: Connections of all clients of this process that have channels.
    opened: weakref.WeakSet[Connections] = weakref.WeakSet()

    def __init__(self, options: ConnectOptions) -> None:
        self.options = options
        self._channels: dict[Endpoint, grpc.aio.Channel] = {}
        self._turn = 0
        self._closed = False
        #: Calls and streams in progress.
        self.n_in_progress = 0
        #: Says why no worker will ever answer again, if that is known.
        self.has_ended: Callable[[], WorkerError | None] | None = None

    @contextlib.contextmanager
    def in_progress(self) -> Iterator[None]:
        """Counts a call or a stream while it lasts."""
        self.opened.add(self)
        self.n_in_progress += 1
        try:
            yield
        finally:
            self.n_in_progress -= 1

    def check_open(self) -> None:
        """Raises :class:`ClosedError` after :meth:`close`."""
        if self._closed:
            raise ClosedError("the client is closed")

    def metadata(self, priority: Priority | None) -> tuple[tuple[str, str], ...]:
        """Returns the metadata of a call."""
        metadata = self.options.metadata()
        if priority is not None:
            metadata += (("imagegpt-priority", chosen("priority", priority, PRIORITIES)),)
        return metadata

    def next(self) -> tuple[Endpoint, Any]:
        """Returns the endpoint whose turn it is, and a stub for it."""
        self.check_open()
        endpoints = self.options.endpoints
        endpoint = endpoints[self._turn % len(endpoints)]
        self._turn += 1
        channel = self._channels.get(endpoint)
        if channel is None:
            channel = self._channels[endpoint] = self.options.channel(endpoint)
        return endpoint, imagegpt_pb2_grpc.ImageGptServiceStub(channel)  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        """Closes all channels; calls in progress fail."""
        self._closed = True
        await self.release()

    async def release(self) -> None:
        """Closes all channels; the next call opens others."""
        channels, self._channels = list(self._channels.values()), {}
        self.opened.discard(self)
        for channel in channels:
            await channel.close(None)

    async def call(
        self,
        call: Callable[[Any, float | None, tuple[tuple[str, str], ...]], Awaitable[_R]],
        *,
        items: Sequence[Hashable],
        timeout: float | None,
        priority: Priority | None = None,
    ) -> _R:
        """Makes a call, and repeats it on the next endpoint while no worker
        answers, and after the wait that a full worker asks for.

        ``call`` gets a stub, the seconds that are left, and the metadata.

        Raises:
            WorkerError: The call failed for good; the error has ``items``.
        """
        with self.in_progress():
            return await self._call(call, items, timeout, priority)

    async def _call(
        self,
        call: Callable[[Any, float | None, tuple[tuple[str, str], ...]], Awaitable[_R]],
        items: Sequence[Hashable],
        timeout: float | None,
        priority: Priority | None,
    ) -> _R:
        patience = Patience(time.monotonic(), timeout)
        while True:
            endpoint, stub = self.next()
            left = patience.left(time.monotonic())
            try:
                return await call(stub, left, self.metadata(priority))
            except grpc.aio.AioRpcError as error:
                failure = Failure.of(error)
            except (grpc.aio.UsageError, asyncio.CancelledError):
                # A channel that is closed cancels its calls.
                self.check_open()
                raise
            # An exception that a program keeps would keep its frames, and with a stub
            # of theirs the connection, also where a fork must close it.
            del stub
            self.check_open()
            ended = self.has_ended() if self.has_ended is not None else None
            if ended is not None:
                ended.items = list(items)
                raise ended
            wait = patience.wait(failure, time.monotonic())
            if wait is None:
                raise failure.error(items, str(endpoint))
            log.debug("a call to %s is repeated in %.3f s: %s", endpoint, wait, failure.message)
            await asyncio.sleep(wait)
