"""Patience of a stream with workers that are away when it begins."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

import imagegpt.stream
from imagegpt import Client, LocalWorker, UnavailableError
from imagegpt.loop import GrpcLoop

EMOJI = Path(__file__).resolve().parent.parent.parent / "models" / "emoji"


def seconds_until_failure(client: Client) -> float:
    """Returns the seconds after which a stream gives up."""
    begun = time.monotonic()
    with pytest.raises(UnavailableError):
        list(client.embed_stream([b"x"], give_up_after=4.0))
    return time.monotonic() - begun


def test_a_client_that_knows_its_workers_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagegpt.stream, "FIRST_PATIENCE", 0.5)
    with LocalWorker(EMOJI, fake_engine="1ms") as worker, Client(worker.endpoint) as client:
        client.model()
        worker.close()
        assert seconds_until_failure(client) > 3.0
        with Client(worker.endpoint) as stranger:
            assert seconds_until_failure(stranger) < 3.0


@pytest.mark.parametrize("steps", range(6))
def test_a_stream_ends_at_whatever_moment_its_keeper_wakes_up(steps: int) -> None:
    """``asyncio.wait_for`` of Python 3.11 loses a cancellation that comes with what is
    waited for; the keeper then went on, and the end of the stream waited for it."""

    async def seconds_to_close() -> float:
        core = client._core()
        embed, options = core.stream_options(
            layers=None,
            pooling="mean",
            fit=None,
            alpha=None,
            context="raw",
            norm="pre-attn-rms",
            normalize=False,
            dtype="f32",
            window=0,
            item_timeout=60.0,
            give_up_after=600.0,
            priority=None,
            on_error="raise",
        )
        ignore = lambda *_: None  # noqa: E731
        stream = core.stream(embed, options, ignore, ignore, ignore)
        stream.start()
        # The keeper has looked for workers, and waits.
        await asyncio.sleep(0.05)
        stream._look.set()
        for _ in range(steps):
            await asyncio.sleep(0)
        begun = time.monotonic()
        async with asyncio.timeout(20.0):
            await stream.close()
        return time.monotonic() - begun

    # A name that needs no lookup, and a port at which nobody listens.
    with Client("127.0.0.1:9") as client:
        assert GrpcLoop.get().run(seconds_to_close()) < 5.0
