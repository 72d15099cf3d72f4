"""The event loop in which all calls of a process run, and forks of the process.

grpc.aio works in one event loop per process, and writes errors into the log of a
program with several. So calls do not run in the loop of the program, if it has one.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from imagegpt.calls import Connections
from imagegpt.errors import ForkError

__all__ = ["GrpcLoop", "StreamOwner"]

_T = TypeVar("_T")


class GrpcLoop:
    """Event loop in a thread of its own, which all clients of a process share."""

    # Held while a call is handed over, and during a fork.
    _lock = threading.Lock()
    _current: GrpcLoop | None = None

    def __init__(self) -> None:
        self.process = os.getpid()
        self.loop = asyncio.new_event_loop()
        # A daemon, so that a client that was not closed does not keep the program.
        self.thread = threading.Thread(target=self.loop.run_forever, name="imagegpt", daemon=True)
        self.thread.start()
        # The loop itself keeps only weak references.
        self.tasks: set[asyncio.Task[None]] = set()

    @classmethod
    def get(cls) -> GrpcLoop:
        """Returns this process's loop.

        Raises:
            ForkError: The process was forked while its parent made calls.
        """
        if _Forks.is_broken:
            raise ForkError(
                "this process was forked while its parent had calls in progress, which gRPC does "
                "not survive; start processes by the method 'spawn' or 'forkserver', or fork "
                "before the first call"
            )
        with cls._lock:
            if cls._current is None:
                cls._current = GrpcLoop()
            return cls._current

    @classmethod
    def current(cls) -> GrpcLoop | None:
        """Returns this process's loop, if there is one."""
        current = cls._current
        return current if current is not None and current.is_own else None

    def submit(self, coroutine: Coroutine[Any, Any, _T]) -> concurrent.futures.Future[_T]:
        """Begins a coroutine in the loop."""
        with self._lock:
            return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def soon(self, call: Callable[..., object], *arguments: Any) -> None:
        """Makes a call in the loop, and does not wait for it."""
        self.loop.call_soon_threadsafe(call, *arguments)

    @property
    def is_own(self) -> bool:
        """True in the process that made this loop; in a forked one its thread does not
        run."""
        return self.process == os.getpid()

    def check_own(self) -> None:
        """Checks that the process is the one that made this loop.

        Raises:
            ForkError: The process was forked from that one.
        """
        if not self.is_own:
            raise ForkError(
                "this stream belongs to the process that began it, from which this one was "
                "forked; begin a stream here, in a process started by 'spawn' or 'forkserver'"
            )

    def finish(self, end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Ends something, and waits for it. ``end`` may be called twice.

        Does not wait where nothing would come: in a forked process, while the
        interpreter ends, and in the loop's own thread, where the garbage collector may
        free a stream or a client. A caller that is interrupted does not wait further;
        the end goes on.
        """
        if not self.is_own or sys.is_finalizing():
            return
        ended: concurrent.futures.Future[None] = concurrent.futures.Future()

        def begin() -> None:
            self._begin(end).add_done_callback(tell)

        def tell(task: asyncio.Task[None]) -> None:
            if ended.done():
                return
            error = None if task.cancelled() else task.exception()
            if error is None:
                ended.set_result(None)
            else:
                ended.set_exception(error)

        if threading.current_thread() is self.thread:
            begin()
            return
        try:
            self.soon(begin)
        except BaseException:
            # An interrupt, maybe before the call was handed over.
            self.soon(begin)
            raise
        ended.result()

    def abandon(self, end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Ends something whose owner was freed without ending it; does not wait."""
        if self.is_own and not sys.is_finalizing():
            self.soon(self._begin, end)

    def _begin(self, end: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        """Begins a coroutine, in the loop's own thread, and keeps it until it ends."""
        self.tasks.add(task := self.loop.create_task(end()))
        task.add_done_callback(self.tasks.discard)
        return task

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Runs a coroutine in the loop, and waits for it."""
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            # The caller was interrupted, or the coroutine failed.
            future.cancel()
            raise


class StreamOwner:
    """Guard of a stream that ends it if its generator is freed without having ended
    it, as one may be that is interrupted while it ends."""

    def __init__(self, loop: GrpcLoop, end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._finalizer = weakref.finalize(self, loop.abandon, end)
        # The end of the program has its own end of streams.
        self._finalizer.atexit = False

    def release(self) -> None:
        """Makes the guard do nothing: the stream has ended."""
        self._finalizer.detach()


# Longest time in seconds in which connections are closed before a fork.
_FORK_TIMEOUT = 5.0
# Collections of garbage before a fork; two were enough where one was not.
_COLLECTIONS = 4


def _polls() -> bool:
    """True if a thread of grpc.aio waits within gRPC, as one does while there are
    channels."""
    return any("_poll_wrapper" in thread.name for thread in threading.enumerate())


class _Forks:
    """gRPC works in a forked process only if no thread of the parent was within it
    at the time. So connections without calls are closed before a fork, and opened
    again when they are needed; a process that was forked during calls says so."""

    #: True in a process whose parent had calls in progress.
    is_broken = False
    _was_busy = False

    @classmethod
    def before(cls) -> None:
        """Closes the connections, and lets no call begin until the fork is done."""
        GrpcLoop._lock.acquire()
        loop = GrpcLoop._current
        opened = list(Connections.opened)
        cls._was_busy = any(connections.n_in_progress for connections in opened)
        if loop is None or loop.process != os.getpid() or cls._was_busy:
            # Without a loop, connections are those of asyncio programs.
            cls._was_busy = cls._was_busy or _polls()
            return
        try:
            asyncio.run_coroutine_threadsafe(cls._release(opened), loop.loop).result(_FORK_TIMEOUT)
        except (TimeoutError, RuntimeError):
            cls._was_busy = True
        del opened
        # What is left of the channels keeps a thread within gRPC. Tasks and calls that
        # refer to each other are freed by several collections; an exception that the
        # program keeps is not.
        for _ in range(_COLLECTIONS):
            if not _polls():
                return
            gc.collect()
        cls._was_busy = cls._was_busy or _polls()

    @staticmethod
    async def _release(opened: list[Connections]) -> None:
        for connections in opened:
            await connections.release()

    @staticmethod
    def after_in_parent() -> None:
        """Lets calls begin again."""
        GrpcLoop._lock.release()

    @classmethod
    def after_in_child(cls) -> None:
        """Begins without the parent's loop, whose thread does not exist here."""
        cls.is_broken = cls.is_broken or cls._was_busy
        GrpcLoop._lock, GrpcLoop._current = threading.Lock(), None


os.register_at_fork(
    before=_Forks.before,
    after_in_parent=_Forks.after_in_parent,
    after_in_child=_Forks.after_in_child,
)
