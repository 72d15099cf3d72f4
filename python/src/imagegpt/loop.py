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
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from imagegpt.calls import Connections
from imagegpt.errors import ForkError

__all__ = ["GrpcLoop"]

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
        return current if current is not None and current.process == os.getpid() else None

    def submit(self, coroutine: Coroutine[Any, Any, _T]) -> concurrent.futures.Future[_T]:
        """Begins a coroutine in the loop."""
        with self._lock:
            return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def soon(self, call: Callable[..., None], *arguments: Any) -> None:
        """Makes a call in the loop, and does not wait for it."""
        self.loop.call_soon_threadsafe(call, *arguments)

    def finish(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Runs a coroutine that ends something. Does not wait where nothing would
        come: while the interpreter ends, and in the loop's own thread, where the
        garbage collector may free a stream or a client."""
        if sys.is_finalizing():
            # The loop's thread no longer runs.
            coroutine.close()
        elif threading.current_thread() is self.thread:
            self.tasks.add(task := self.loop.create_task(coroutine))
            task.add_done_callback(self.tasks.discard)
        else:
            self.run(coroutine)

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Runs a coroutine in the loop, and waits for it."""
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            # The caller was interrupted, or the coroutine failed.
            future.cancel()
            raise


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
