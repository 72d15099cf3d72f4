"""Streams of images over a pool of workers.

Host names are resolved again and again, and each address that they have gets a
session: a task with a connection and one EmbedStream. A session takes the next
image from the feed whenever its worker has room, so a worker that is twice as
fast does twice as much. The unanswered images of a session go back to the feed
when its stream ends, for whatever reason. So an image is with one worker at a
time, and is answered once.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc.aio

from imagegpt.calls import Connections, Failure, backoff, code_name, log
from imagegpt.endpoints import ADDRESSES_MAX, Address
from imagegpt.errors import (
    ImageError,
    ModelMismatchError,
    UnavailableError,
    image_error,
)
from imagegpt.options import PRIORITIES, EmbedOptions, Priority, chosen, whole_number
from imagegpt.results import array_of
from imagegpt.v1 import imagegpt_pb2 as pb
from imagegpt.v1 import imagegpt_pb2_grpc

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["EmbedStream", "StreamOptions", "Task"]

# Longest time in seconds to connect, and to get the first answer.
HELLO_TIMEOUT = 10.0
# Rest in seconds for a worker that serves another model or applies other options,
# until it is rolled over.
REST_OTHER = 30.0
# Longest rest that is accepted from a worker's RetryInfo.
RETRY_AFTER_MAX = 60.0
# Longest time for a single image while the worker answers others, in multiples of
# the time for an answer.
STRAGGLER_FACTOR = 10
# Failures with a code that may pass after which an image counts as failed.
FAILURES_MAX = 4
# Workers that may end with an image before the image is a suspect. Ordinary
# trouble, a rolling restart or a reclaimed machine, meets an image once or twice.
LOST_BEFORE_SUSPECT = 3
# Workers that may end with a suspect that they have alone, before it is an error.
LOST_ALONE = 3
# Longest wait after the last answer for a worker to close the stream.
FAREWELL = 1.0
# Time between two lookups of the host names.
RESOLVE_INTERVAL = 10.0
# Time without any worker at the beginning after which the stream of a client that
# has never reached one fails: a wrong address would otherwise look like a slow worker.
FIRST_PATIENCE = 30.0
# Bytes of an item beside its encoded image.
_MESSAGE_BYTES = 4096
# Images that wait for a session, beside those that are with workers.
WAITING_MAX = 64
# Bytes of images that wait or are with workers. One image may always be on its
# way, however large.
BYTES_MAX = 256 << 20

# Codes of an image that another try cannot change.
_LASTING = frozenset(
    {"INVALID_ARGUMENT", "OUT_OF_RANGE", "FAILED_PRECONDITION", "UNIMPLEMENTED", "NOT_FOUND"}
)
# Codes of a stream that another worker of the same kind would answer too.
_FATAL = _LASTING | {"UNAUTHENTICATED", "PERMISSION_DENIED"}
# Reasons of a stream that its worker closed as planned, which is no failure.
_ORDERLY = frozenset({"CONNECTION_AGE", "DRAINING", "STREAM_IDLE"})


@dataclass(eq=False, slots=True)
class Task:
    """Image that waits for its answer."""

    number: int
    id: Hashable
    #: Serialized item, ready to be sent.
    message: bytes
    #: Number of times that a worker answered with a code that may pass.
    failures: int = 0
    #: Number of times that a worker ended or hung while it had this image.
    lost: int = 0
    since: float = 0.0

    @staticmethod
    def of(number: int, id: Hashable, image: pb.Image) -> Task:
        """Serializes an image. The number is its id on the wire, so that ids may be
        anything, also equal ones."""
        item = pb.EmbedStreamItem(id=str(number), image=image)
        return Task(number, id, pb.EmbedStreamRequest(item=item).SerializeToString())

    @property
    def is_suspect(self) -> bool:
        """True if the image was with several workers when they ended: the next one
        gets it alone, so that no other image is lost with it."""
        return self.lost >= LOST_BEFORE_SUSPECT

    @property
    def is_guilty(self) -> bool:
        """True if no other worker may get the image."""
        return self.lost >= LOST_BEFORE_SUSPECT + LOST_ALONE


@dataclass(frozen=True)
class StreamOptions:
    """Options of a stream that no worker sees."""

    window: int
    item_timeout: float
    give_up_after: float
    priority: Priority | None
    digest: str | None
    #: True if the client has reached a worker before, so that the addresses are
    #: known to be right.
    is_known: bool = False


class _Feed:
    """Queue from which sessions take images: first those that came back."""

    def __init__(self) -> None:
        self._fresh: deque[Task] = deque()
        self._returned: list[Task] = []
        self._suspects: deque[Task] = deque()
        #: Events of the sessions that may wait for an image.
        self.listeners: set[asyncio.Event] = set()

    def add(self, tasks: Sequence[Task]) -> None:
        self._fresh.extend(tasks)
        self.wake()

    def give_back(self, task: Task) -> None:
        if task.is_suspect:
            self._suspects.append(task)
        else:
            bisect.insort(self._returned, task, key=lambda other: other.number)
        self.wake()

    def wake(self) -> None:
        """Makes the sessions look for an image."""
        for listener in self.listeners:
            listener.set()

    def take(self, is_idle: bool) -> Task | None:
        """Takes the next image, if a worker that is idle or not may have one now.
        While a suspect waits, only an idle worker gets one."""
        if self._suspects:
            return self._suspects.popleft() if is_idle else None
        if self._returned:
            return self._returned.pop(0)
        return self._fresh.popleft() if self._fresh else None


class _SessionEnded(Exception):
    """End of a session's stream."""

    def __init__(
        self,
        reason: str,
        *,
        rest: float | None = None,
        is_orderly: bool = False,
        failure: Failure | None = None,
        mismatch: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.rest = rest
        self.is_orderly = is_orderly
        self.failure = failure
        #: Digest of the other model that the worker serves.
        self.mismatch = mismatch

    @staticmethod
    def of(error: grpc.aio.AioRpcError) -> _SessionEnded:
        failure = Failure.of(error)
        rest = failure.retry_after
        return _SessionEnded(
            f"{failure.code}: {failure.message}",
            rest=None if rest is None else min(rest, RETRY_AFTER_MAX),
            is_orderly=failure.reason in _ORDERLY,
            failure=failure,
        )


@dataclass
class _Outstanding:
    """Images that a worker has and has not answered."""

    tasks: dict[int, Task] = field(default_factory=dict)
    #: Set whenever there may be room or an image, so that the writer looks.
    look: asyncio.Event = field(default_factory=asyncio.Event)
    last_answer: float = field(default_factory=time.monotonic)
    answered: int = 0

    def is_alone(self) -> bool:
        """True if the worker has a suspect, which must be its only image."""
        return any(task.is_suspect for task in self.tasks.values())


Answer = tuple[Task, "NDArray[Any] | ImageError"]


async def _send(call: Any, message: bytes) -> bool:
    """Sends a message; returns False if the stream has ended.

    When a worker ends a stream while a message is on its way, ``write`` of grpc.aio
    replaces the worker's status by one of its own, drops the answers that were not
    read yet, and never frees the call. So the message goes past ``write`` to the call
    below it, as long as there is such a call.
    """
    below = getattr(call, "_cython_call", None)
    if call.done():
        return False
    try:
        if below is None:
            await call.write(message)
        else:
            await below.send_serialized_message(message)
    except asyncio.CancelledError:
        call.cancel()
        raise
    except (asyncio.InvalidStateError, grpc.aio.AioRpcError, grpc.aio.InternalError):
        return False
    return True


class EmbedStream:
    """Running stream over all workers, within one event loop.

    ``answers`` is called with each image's outcome, once; ``failed`` at most once,
    with the error that ends the stream; ``opened`` whenever a worker has taken a
    stream, which adds to ``capacity``.
    """

    #: Streams of this process that are open.
    opened: weakref.WeakSet[EmbedStream] = weakref.WeakSet()

    def __init__(
        self,
        connections: Connections,
        embed: EmbedOptions,
        options: StreamOptions,
        answers: Callable[[Answer], None],
        failed: Callable[[Exception], None],
        opened: Callable[[], None],
    ) -> None:
        self._connect = connections.options
        self._in_progress = connections.in_progress()
        self._embed = embed
        self._options = options
        self._answers = answers
        self._failed = failed
        self._opened = opened
        self._feed = _Feed()
        self._sessions: dict[Address, asyncio.Task[None]] = {}
        self._addresses: set[Address] = set()
        #: Latest trouble with each address, and with each name.
        self._troubles: dict[object, _SessionEnded] = {}
        self._windows: dict[Address, int] = {}
        self._digest = options.digest
        self._applied: pb.EmbedStreamOptions | None = None
        self._look = asyncio.Event()
        self._last_word = time.monotonic()
        self._unanswered = 0
        self._has_opened = False
        #: Largest encoded image in bytes, as the first worker says.
        self.image_bytes_max = 0
        #: Largest image in bytes in any form.
        self.message_bytes_max = 0
        self._finishing = False
        self._ended = False
        self._keeper: asyncio.Task[None] | None = None

    @property
    def capacity(self) -> int:
        """Number of images that may be on their way; 0 before a worker has said how
        large they may be."""
        if not self._has_opened:
            return 0
        return sum(self._windows.values()) + WAITING_MAX

    @property
    def digest(self) -> str | None:
        """Digest of the model that answers; ``None`` before the first worker does."""
        return self._digest

    def start(self) -> None:
        """Starts to look for workers."""
        self._in_progress.__enter__()
        self.opened.add(self)
        self._keeper = asyncio.get_running_loop().create_task(self._keep())

    def add(self, tasks: Sequence[Task]) -> None:
        """Adds images to be sent."""
        if self._unanswered == 0:
            # Nobody was waited for.
            self._last_word = time.monotonic()
        self._unanswered += len(tasks)
        self._feed.add(tasks)

    async def close(self) -> None:
        """Ends the stream: in good order if all images are answered, or else at
        once."""
        if self not in self.opened:
            return
        self.opened.discard(self)
        self._finishing = self._unanswered == 0 and not self._ended
        # First, so that no task goes on that is canceled in vain.
        self._ended = True
        ending = set(self._sessions.values())
        if not self._finishing:
            for task in ending:
                task.cancel()
        if self._keeper is not None:
            self._keeper.cancel()
            ending.add(self._keeper)
        self._feed.wake()
        # Each wait is bounded: a program that ends a stream must not hang with it.
        for _ in range(2):
            if ending:
                _, ending = await asyncio.wait(ending, timeout=2 * FAREWELL)
            for task in ending:
                task.cancel()
        for task in ending:
            log.warning("a task of a stream does not end: %r", task)
        self._in_progress.__exit__(None, None, None)

    # The keeper: addresses and the end of patience.

    async def _keep(self) -> None:
        try:
            while not self._ended:
                await self._resolve()
                self._check_patience()
                # Sooner while nothing is known, and later to find new workers.
                quick = min(0.3, self._options.give_up_after / 4)
                wait = RESOLVE_INTERVAL if self._has_opened else quick
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(wait, self._options.item_timeout)):
                        await self._look.wait()
                self._look.clear()
        except Exception as error:
            self._fail(error)

    async def _resolve(self) -> None:
        addresses: set[Address] = set()
        for endpoint in self._connect.endpoints:
            try:
                async with asyncio.timeout(HELLO_TIMEOUT):
                    found = await endpoint.resolve()
            except (OSError, TimeoutError) as error:
                reason = f"{endpoint.host} has no address: {error or 'no answer'}"
                self._troubles[endpoint] = _SessionEnded(reason)
                # Workers that are known are kept while the name service is away.
                addresses |= {known for known in self._addresses if known.endpoint == endpoint}
                continue
            self._troubles.pop(endpoint, None)
            addresses |= set(found)
        self._addresses = set(sorted(addresses, key=str)[:ADDRESSES_MAX])
        for address in self._addresses:
            session = self._sessions.get(address)
            if session is None or session.done():
                loop = asyncio.get_running_loop()
                self._sessions[address] = loop.create_task(self._session(address))
        for address in [known for known in self._troubles if isinstance(known, Address)]:
            if address not in self._addresses:
                self._troubles.pop(address)

    def _check_patience(self) -> None:
        if self._unanswered == 0 and self._has_opened:
            return
        limit = self._options.give_up_after
        # A worker that is loading its model says so with a reason.
        is_reached = any(
            trouble.failure is not None and trouble.failure.reason
            for trouble in self._troubles.values()
        )
        if not (self._has_opened or self._options.is_known or is_reached):
            limit = min(limit, FIRST_PATIENCE)
        silent = time.monotonic() - self._last_word
        if silent < limit:
            return
        reasons = "; ".join(
            f"{where}: {trouble.reason}" for where, trouble in self._troubles.items()
        )
        text = f"no worker has answered in {silent:.0f} s: {reasons or 'no reason is known'}"
        self._fail(UnavailableError("UNAVAILABLE", text))

    def _fail(self, error: Exception) -> None:
        if self._ended:
            return
        self._ended = True
        current = asyncio.current_task()
        for task in self._sessions.values():
            if task is not current:
                task.cancel()
        self._failed(error)

    # A session: one address.

    async def _session(self, address: Address) -> None:
        waits = backoff()
        while not self._ended and address in self._addresses:
            outstanding = _Outstanding()
            try:
                await self._converse(address, outstanding)
                return
            except _SessionEnded as error:
                ended = error
            except grpc.aio.AioRpcError as error:
                ended = _SessionEnded.of(error)
            except Exception as error:
                # A file of TLS or the token's, or a fault of this package, which no
                # other try would change.
                self._fail(error)
                return
            finally:
                self._windows.pop(address, None)
                for task in outstanding.tasks.values():
                    self._feed.give_back(task)
                outstanding.tasks.clear()
            if self._finishing or self._ended:
                return
            if outstanding.answered:
                waits = backoff()
            rest = next(waits)
            # The addresses of the name may have changed with the failure.
            self._look.set()
            if ended.is_orderly:
                log.info("the stream of %s ended: %s", address, ended.reason)
                rest = next(backoff())
            else:
                log.warning("%s is left out for a while: %s", address, ended.reason)
                self._troubles[address] = ended
                rest = max(rest, ended.rest or 0.0)
                self._judge(ended)
            await asyncio.sleep(rest)

    def _judge(self, ended: _SessionEnded) -> None:
        """Fails the stream if waiting for this or another worker is in vain."""
        failure = ended.failure
        if failure is not None and failure.code in _FATAL and not self._has_opened:
            self._fail(failure.error())
            return
        known = [self._troubles.get(address) for address in self._addresses]
        mismatches = [trouble.mismatch for trouble in known if trouble is not None]
        if known and len(mismatches) == len(known) and all(mismatches):
            others = ", ".join(sorted({str(digest) for digest in mismatches}))
            text = f"the workers serve another model ({others}) than {self._digest}"
            self._fail(ModelMismatchError("FAILED_PRECONDITION", text))

    async def _converse(self, address: Address, outstanding: _Outstanding) -> None:
        channel = self._connect.channel(address.endpoint, address)
        try:
            stub: Any = imagegpt_pb2_grpc.ImageGptServiceStub(channel)  # type: ignore[no-untyped-call]
            window, call = await self._open(channel, stub)
            self._troubles.pop(address, None)
            self._windows[address] = window
            self._opened()
            self._last_word = outstanding.last_answer = time.monotonic()
            self._feed.listeners.add(outstanding.look)
            loop = asyncio.get_running_loop()
            jobs = [
                loop.create_task(self._write(call, window, outstanding)),
                loop.create_task(self._read(call, outstanding)),
                loop.create_task(self._watch(outstanding)),
            ]
            try:
                await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
                # Of several that ended, the reader knows the reason.
                for job in (jobs[1], jobs[0], jobs[2]):
                    if job.cancelled():
                        raise _SessionEnded("the connection was lost")
                    if job.done():
                        job.result()
                        break
            except (_SessionEnded, grpc.aio.AioRpcError) as error:
                self._count_lost(error, outstanding)
                raise
            finally:
                self._feed.listeners.discard(outstanding.look)
                for job in jobs:
                    job.cancel()
                await asyncio.gather(*jobs, return_exceptions=True)
                call.cancel()
        finally:
            await channel.close(None)

    def _count_lost(
        self, error: _SessionEnded | grpc.aio.AioRpcError, outstanding: _Outstanding
    ) -> None:
        """Counts the images as lost: the worker has ended with them, or is taken to
        have."""
        ended = error if isinstance(error, _SessionEnded) else _SessionEnded.of(error)
        if ended.is_orderly:
            return
        for task in list(outstanding.tasks.values()):
            task.lost += 1
            if task.is_guilty:
                del outstanding.tasks[task.number]
                text = (
                    f"{task.lost} workers ended or hung while they had this image, the last ones "
                    "while they had no other"
                )
                self._settle(task, image_error(task.id, "ABORTED", text))

    @staticmethod
    async def _hello(step: Any, name: str) -> Any:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT):
                return await step
        except TimeoutError:
            reason = f"the worker did not {name} within {HELLO_TIMEOUT:.0f} s"
            raise _SessionEnded(reason) from None

    async def _open(self, channel: grpc.aio.Channel, stub: Any) -> tuple[int, Any]:
        """Opens a stream, and checks that the worker serves the model and applies
        the options."""
        metadata = self._connect.metadata()
        if self._options.priority is not None:
            metadata += (("imagegpt-priority", self._options.priority),)
        call = stub.GetModel(pb.GetModelRequest(), metadata=metadata, timeout=HELLO_TIMEOUT)
        model = await call
        wanted = self._embed.opening(model, self._options.window)
        # Items are serialized already.
        method: Any = channel.stream_stream(
            "/imagegpt.v1.ImageGptService/EmbedStream",
            request_serializer=None,
            response_deserializer=pb.EmbedStreamResponse.FromString,
        )
        call = method(metadata=metadata)
        opening = pb.EmbedStreamRequest(open=wanted)
        try:
            await self._hello(call.wait_for_connection(), "take a stream")
            await self._hello(_send(call, opening.SerializeToString()), "take a stream")
            first = await self._hello(call.read(), "open a stream")
            if first is grpc.aio.EOF or first.WhichOneof("message") != "opened":
                # The status says why, if the worker ended the stream.
                await self._raise_status(call)
                raise _SessionEnded("the worker's stream does not begin with an opening")
            opened = first.opened
            self._check_opened(opened, wanted)
        except asyncio.InvalidStateError:
            await self._raise_status(call)
        except BaseException:
            call.cancel()
            raise
        if not self._has_opened:
            self._has_opened = True
            limits = model.limits
            largest = limits.request_bytes_max - _MESSAGE_BYTES
            self.image_bytes_max = max(0, min(limits.image_bytes_max, largest))
            self.message_bytes_max = max(0, largest)
        return max(1, opened.options.window), call

    def _check_opened(self, opened: pb.EmbedStreamOpened, wanted: pb.EmbedStreamOptions) -> None:
        digest = opened.model_digest
        if self._digest is None:
            self._digest = digest
        if digest != self._digest:
            raise _SessionEnded(
                f"the worker serves another model ({digest}) than {self._digest}",
                rest=REST_OTHER,
                mismatch=digest,
            )
        applied = pb.EmbedStreamOptions()
        applied.CopyFrom(opened.options)
        applied.window = 0
        if self._applied is None:
            self._applied = applied
        if applied != self._applied:
            raise _SessionEnded(
                "the worker applies other options than the workers before", rest=REST_OTHER
            )

    @staticmethod
    async def _raise_status(call: Any) -> None:
        """Raises the status with which a call has ended, unless it is OK."""
        code = await call.code()
        if code is grpc.StatusCode.OK:
            raise _SessionEnded("the worker ended the stream")
        raise grpc.aio.AioRpcError(
            code,
            await call.initial_metadata(),
            await call.trailing_metadata(),
            await call.details(),
        )

    async def _write(self, call: Any, window: int, outstanding: _Outstanding) -> None:
        tasks, feed = outstanding.tasks, self._feed
        while True:
            has_room = len(tasks) < window and not outstanding.is_alone()
            task = feed.take(not tasks) if has_room else None
            if task is None:
                if self._finishing:
                    await call.done_writing()
                    # The reader ends first, unless the worker does not close.
                    await asyncio.sleep(FAREWELL)
                    return
                outstanding.look.clear()
                await outstanding.look.wait()
                continue
            task.since = time.monotonic()
            if not tasks:
                # A worker that had no images has not been silent.
                outstanding.last_answer = task.since
            tasks[task.number] = task
            if not await _send(call, task.message):
                # The stream has ended. Only the reader learns why, so this task
                # waits to be canceled.
                await asyncio.get_running_loop().create_future()

    async def _read(self, call: Any, outstanding: _Outstanding) -> None:
        tasks = outstanding.tasks
        while True:
            response = await call.read()
            if response is grpc.aio.EOF:
                if self._finishing:
                    return
                await self._raise_status(call)
            if response.WhichOneof("message") != "result":
                continue
            result = response.result
            task = tasks.pop(int(result.id), None) if result.id.isdigit() else None
            if task is None:
                raise _SessionEnded("the worker answered an image that it did not have")
            self._last_word = outstanding.last_answer = time.monotonic()
            outstanding.answered += 1
            outstanding.look.set()
            if result.WhichOneof("outcome") == "embedding":
                self._settle(task, array_of(result.embedding))
                continue
            code = code_name(result.error.code)
            message = result.error.message or "the worker sent no outcome"
            if code not in _LASTING and task.failures + 1 < FAILURES_MAX:
                task.failures += 1
                self._feed.give_back(task)
                continue
            self._settle(task, image_error(task.id, code, message))

    def _settle(self, task: Task, outcome: NDArray[Any] | ImageError) -> None:
        self._unanswered -= 1
        self._answers((task, outcome))

    async def _watch(self, outstanding: _Outstanding) -> None:
        """Ends the session of a worker that hangs."""
        patience = self._options.item_timeout
        while True:
            # A look every quarter of the patience is exact enough and cheap.
            await asyncio.sleep(patience / 4)
            if not outstanding.tasks:
                continue
            now = time.monotonic()
            oldest = now - min(task.since for task in outstanding.tasks.values())
            silent = now - outstanding.last_answer
            if silent > patience or oldest > patience * STRAGGLER_FACTOR:
                raise _SessionEnded(
                    f"no answer in {oldest:.0f} s for the oldest image (item_timeout); the "
                    f"worker's {len(outstanding.tasks)} images go to other workers"
                )


def check_stream_options(
    window: int, item_timeout: float, give_up_after: float, priority: str | None = None
) -> None:
    """Checks the numbers of a stream.

    Raises:
        ValueError: A number is out of bounds.
    """
    whole_number("window", window, 0)
    for name, value in (("item_timeout", item_timeout), ("give_up_after", give_up_after)):
        if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
            raise TypeError(f"{name}={value!r} is no time in seconds")
        if not value > 0:
            raise ValueError(f"{name}={value} is no time in seconds above 0")
    if priority is not None:
        chosen("priority", priority, PRIORITIES)
