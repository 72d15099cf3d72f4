"""Ends of streams in bad moments: interrupts, and forks of the process."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imagegpt import ForkError, LocalWorker
from imagegpt.loop import GrpcLoop
from imagegpt.stream import EmbedStream

MODELS = Path(__file__).resolve().parent.parent.parent / "models"
PICTURE = MODELS / "pictures" / "animals-nature" / "rooster.png"


@pytest.fixture(scope="module")
def worker() -> Iterator[LocalWorker]:
    with LocalWorker(MODELS / "emoji", fake_engine="5ms") as worker:
        yield worker


def until_no_stream_is_open() -> None:
    # What was handed over to the loop before has begun.
    GrpcLoop.get().run(asyncio.sleep(0))
    end = time.monotonic() + 10.0
    while EmbedStream.opened:
        assert time.monotonic() < end, "a stream stays open"
        time.sleep(0.01)


def interrupt_once(monkeypatch: pytest.MonkeyPatch, owner: object, method: str) -> None:
    """Makes the next call of a method raise KeyboardInterrupt and do nothing."""

    def interrupted(*_: Any) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, method, interrupted)


def test_a_stream_that_is_interrupted_at_its_start_ends(
    worker: LocalWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    soon = GrpcLoop.soon

    def interrupted(loop: GrpcLoop, call: Callable[..., None], *arguments: Any) -> None:
        monkeypatch.undo()
        soon(loop, call, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(GrpcLoop, "soon", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(worker.embed_stream([PICTURE] * 40))
    until_no_stream_is_open()


def test_an_interrupt_of_a_streams_end_does_not_stop_it(
    worker: LocalWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = worker.embed_stream([PICTURE] * 40)
    next(stream)

    interrupt_once(monkeypatch, concurrent.futures.Future, "result")
    with pytest.raises(KeyboardInterrupt):
        stream.close()
    until_no_stream_is_open()


def test_a_stream_whose_end_was_interrupted_before_it_began_ends_when_it_is_freed(
    worker: LocalWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = worker.embed_stream([PICTURE] * 40)
    next(stream)

    interrupt_once(monkeypatch, GrpcLoop, "finish")
    with pytest.raises(KeyboardInterrupt):
        stream.close()
    del stream
    gc.collect()
    until_no_stream_is_open()


FORKED = """
import os
from imagegpt import ForkError
from imagegpt.loop import GrpcLoop

loop = GrpcLoop.get()

async def end():
    os._exit(9)

child = os.fork()
if child == 0:
    # The loop's thread does not run here, so that waiting for it would not end.
    loop.finish(end)
    loop.abandon(end)
    try:
        loop.check_own()
    except ForkError:
        os._exit(7)
    os._exit(8)
loop.check_own()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_loop_of_the_parent_is_not_waited_for() -> None:
    # A process of its own, in which gRPC has no threads that a fork would disturb.
    said = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60
    )
    assert said.stdout == "7\n", said.stderr


@pytest.mark.slow  # gRPC hangs in a forked child now and then.
def test_a_stream_of_the_parent_is_refused_in_a_forked_process(worker: LocalWorker) -> None:
    stream = worker.embed_stream([PICTURE] * 400)
    next(stream)
    for _ in range(10):
        child = os.fork()
        if child == 0:
            code = 8
            try:
                signal.alarm(20)
                next(stream)
            except ForkError:
                code = 7
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        # gRPC's own handlers of forks may end the child before it does anything.
        assert code in (7, -signal.SIGSEGV, -signal.SIGABRT)
    assert sum(1 for _ in stream) == 399
