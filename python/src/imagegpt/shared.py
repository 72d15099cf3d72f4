"""Clients and local workers that the adapters of one process share."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imagegpt.client import Client
from imagegpt.errors import ClosedError, UnavailableError
from imagegpt.worker import LocalWorker, arguments

__all__ = ["remote_client", "shared_worker"]


@dataclass
class _Running:
    worker: LocalWorker
    #: Feature layer that the worker was started with; ``None`` for the model's own.
    layer: int | None


class _Shared:
    """What a process shares. A program names a handful of endpoints and models, so
    neither table is bounded otherwise."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.clients: dict[tuple[Any, ...], Client] = {}
        self.workers: dict[tuple[Any, ...], _Running] = {}


_shared = _Shared()


def _begin_anew() -> None:
    """Gives a fork nothing of its parent's: the lock may be held, and the workers end
    with the parent."""
    global _shared
    _shared = _Shared()


os.register_at_fork(after_in_child=_begin_anew)


def remote_client(endpoint: str | Sequence[str], options: Mapping[str, Any] | None) -> Client:
    """Returns this process's client of an endpoint.

    Args:
        endpoint: As in :class:`~imagegpt.Client`.
        options: Keyword arguments of :class:`~imagegpt.Client`.
    """
    endpoints = (endpoint,) if isinstance(endpoint, str) else tuple(endpoint)
    given = dict(options or {})
    key = (endpoints, tuple(sorted((name, repr(value)) for name, value in given.items())))
    with _shared.lock:
        client = _shared.clients.get(key)
        if client is None:
            client = _shared.clients[key] = Client(list(endpoints), **given)
        return client


def shared_worker(
    model: str | os.PathLike[str], flags: Mapping[str, Any] | None, layer: int | None
) -> LocalWorker:
    """Returns this process's worker of a model, started if there is none that has the
    layer. The worker ends with the process.

    Args:
        model: As in :class:`~imagegpt.LocalWorker`.
        flags: Flags of the worker, and its ``start_timeout`` and ``timeout``. A
            ``feature_layer`` among them is kept; otherwise the worker is started with
            the largest layer that was asked for.
        layer: Layer that the worker must have; ``None`` for the model's default.
    """
    given = dict(flags or {})
    is_fixed = given.get("feature_layer") is not None
    name = os.fspath(model)
    place = os.path.abspath(name) if os.path.exists(name) else name
    # A worker that was started for a layer has that one as its default.
    key = (place, tuple(sorted(arguments(given))), layer is None)
    with _shared.lock:
        running = _shared.workers.get(key)
        has_layer = running is not None and (
            is_fixed or running.layer is None or (layer is not None and layer <= running.layer)
        )
        if running is not None and has_layer and _is_alive(running.worker):
            return running.worker
        if layer is not None and not is_fixed:
            given["feature_layer"] = layer
        worker = LocalWorker(model, **given)
        # An earlier worker ends once the calls in progress in other threads, which
        # hold it, are over.
        _shared.workers[key] = _Running(worker, layer)
        return worker


def _is_alive(worker: LocalWorker) -> bool:
    try:
        worker.model()
    except (ClosedError, UnavailableError):
        return False
    return True
