"""Patience of a stream with workers that are away when it begins."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import imagegpt.stream
from imagegpt import Client, LocalWorker, UnavailableError

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
