"""A worker on this machine, which lives as long as the program needs it."""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sysconfig
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from imagegpt.client import Client
from imagegpt.core import ClientCore, checked_timeout
from imagegpt.errors import UnavailableError, WorkerStartError
from imagegpt.ledger import Ledger
from imagegpt.loop import GrpcLoop
from imagegpt.stream import EmbedStream

__all__ = ["LocalWorker", "find_program"]

log = logging.getLogger("imagegpt.worker")

# Lines of the worker's log that an error shows, and the bytes of one.
_LOG_LINES = 20
_LINE_BYTES_MAX = 1 << 16
# Longest time in seconds for the last answers of a worker that is closed, and then
# for its end.
_GRACE = 30.0
# Longest time in seconds in which streams are closed at the end of the program.
_STREAMS_GRACE = 5.0
# Variables that are meant for a worker that others reach.
_OF_OTHERS = (
    "IMAGEGPT_AUTH_TOKENS_FILE",
    "IMAGEGPT_TLS_CERT",
    "IMAGEGPT_TLS_KEY",
    "IMAGEGPT_TLS_CLIENT_CA",
    "IMAGEGPT_SHUTDOWN_DELAY",
)
# Flags that LocalWorker gives by itself.
_OWN_FLAGS = frozenset(
    {
        *("model", "listen", "metrics_listen", "log", "log_format", "exit_on_stdin_eof"),
        *("auth_tokens_file", "tls_cert", "tls_key", "tls_client_ca", "shutdown_delay"),
    }
)
_OWN_FLAGS_REASON = (
    "the worker listens on free ports of this machine for this program alone, and logs to "
    "logging; start `imagegpt serve` and use Client for a worker that others reach"
)
_LEVELS = {
    "ERROR": logging.ERROR,
    "WARN": logging.WARNING,
    "INFO": logging.INFO,
    "DEBUG": logging.DEBUG,
}


def find_program() -> Path:
    """Returns the path of the ``imagegpt`` program: that of the environment variable
    ``IMAGEGPT_BINARY``, or else the one that was installed with this package, or else
    the first one in ``PATH``.

    Raises:
        WorkerStartError: There is no program.
    """
    given = os.environ.get("IMAGEGPT_BINARY")
    if given:
        return Path(given)
    try:
        files = importlib.metadata.distribution("imagegpt").files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    installed = [Path(file.locate()) for file in files if file.name == "imagegpt"]
    scripts = Path(sysconfig.get_path("scripts")) / "imagegpt"
    for path in (*installed, scripts):
        if path.is_file() and os.access(path, os.X_OK):
            return path.resolve()
    found = shutil.which("imagegpt")
    if found is None:
        raise WorkerStartError(
            "the program imagegpt is neither installed with this package nor in PATH; set "
            "IMAGEGPT_BINARY to its path",
            None,
            (),
        )
    return Path(found)


def find_onnxruntime() -> Path | None:
    """Returns the shared library of the ``onnxruntime`` package of this Python
    environment; ``None`` if there is none."""
    try:
        spec = importlib.util.find_spec("onnxruntime")
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder, "capi").glob("libonnxruntime.so*")):
            return path
    return None


def arguments(flags: Mapping[str, Any]) -> list[str]:
    """Returns keyword arguments as flags of ``imagegpt serve``: ``feature_layer=8`` is
    ``--feature-layer=8``, ``True`` the flag alone, ``None`` and ``False`` nothing, a
    list the flag for each element, and a mapping ``NAME=VALUE`` for each entry."""
    found: list[str] = []
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            found.append(flag)
        elif isinstance(value, Mapping):
            found += [f"{flag}={key}={entry}" for key, entry in value.items()]
        elif isinstance(value, Iterable) and not isinstance(value, (str, os.PathLike)):
            found += [f"{flag}={element}" for element in value]
        else:
            found.append(f"{flag}={os.fspath(value) if isinstance(value, os.PathLike) else value}")
    return found


class LocalWorker(Client):
    """Worker in a process of its own on this machine, and the client of it.

    The worker listens on free ports of 127.0.0.1. It ends with ``close``, at the end
    of a ``with`` block, with this program, or when this object is no longer used.

    Args:
        model: What ``imagegpt serve --model`` takes: a directory of Hugging Face
            weights, a hub id such as ``"openai/imagegpt-small"``, an ONNX export, or a
            compiled directory. Weights are compiled once, into a cache.
        start_timeout: Longest time in seconds until the worker is ready, with the
            download and the compilation of the model.
        timeout: As in :class:`~imagegpt.Client`.
        flags: Flags of ``imagegpt serve``, with underscores: ``feature_layer=8``,
            ``precision="int8"``, ``head={"category": "category.safetensors"}``.

    Raises:
        WorkerStartError: The worker did not become ready; the error has the end of
            its log.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        start_timeout: float = 1800.0,
        timeout: float | None = 300.0,
        **flags: Any,
    ) -> None:
        if isinstance(model, os.PathLike) and not Path(model).exists():
            raise FileNotFoundError(f"{os.fspath(model)} does not exist")
        for name in _OWN_FLAGS & flags.keys():
            raise TypeError(f"{name} is not an argument: {_OWN_FLAGS_REASON}")
        checked_timeout("timeout", timeout)
        patience = checked_timeout("start_timeout", start_timeout)
        command = [
            os.fspath(find_program()),
            "serve",
            f"--model={os.fspath(model)}",
            "--listen=127.0.0.1:0",
            "--metrics-listen=127.0.0.1:0",
            "--log-format=json",
            "--log=info,ort=warn",
            "--exit-on-stdin-eof",
            *arguments(flags),
        ]
        environment = {name: value for name, value in os.environ.items() if name not in _OF_OTHERS}
        library = find_onnxruntime()
        if library is not None:
            environment.setdefault("ORT_DYLIB_PATH", str(library))
        try:
            self._process_handle = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment,
                # Ctrl-C in a terminal is meant for the program, which ends the worker
                # itself.
                start_new_session=True,
            )
        except OSError as error:
            raise WorkerStartError(f"{command[0]} cannot be started: {error}", None, ()) from error
        self._owner = os.getpid()
        _running.add(self)
        self._log = _Log(self._process_handle)
        self._finalizer = weakref.finalize(self, _end, self._process_handle, self._owner)
        # At exit after the streams, which would complain of a worker that is gone.
        self._finalizer.atexit = False
        try:
            endpoint = self._log.await_ready(patience)
        except BaseException:
            self._finalizer()
            raise
        super().__init__(endpoint, timeout=timeout)

    @property
    def endpoint(self) -> str:
        """URL of the worker, for other clients on this machine."""
        return str(self._arguments["endpoints"])

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process_handle.pid

    def __enter__(self) -> LocalWorker:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "a LocalWorker cannot be pickled, since it owns a process; give Client(worker.endpoint)"
        )

    def close(self) -> None:
        """Ends the worker, after the answers of the calls in progress."""
        super().close()
        self._finalizer()

    def _check_usable(self, ledger: Ledger) -> None:
        super()._check_usable(ledger)
        error = self._ended()
        if error is not None:
            error.items = ledger.unanswered()
            raise error

    def _core(self) -> ClientCore:
        error = None if self._closed else self._ended()
        if error is not None:
            raise error
        core = super()._core()
        # Weak, so that a worker that is forgotten ends at once.
        ended = weakref.WeakMethod(self._ended)

        def has_ended() -> UnavailableError | None:
            method = ended()
            return None if method is None else method()

        core.watch(has_ended)
        return core

    def _ended(self) -> UnavailableError | None:
        """Returns the error of calls to a worker that has ended, which cannot come
        back."""
        # A fork cannot ask for the end of a process that is not its child.
        if os.getpid() != self._owner or self._process_handle.poll() is None:
            return None
        text = f"the local worker has ended with exit code {self._process_handle.returncode}"
        last = "; ".join(list(self._log.lines)[-2:])
        return UnavailableError("UNAVAILABLE", f"{text}: {last}")

    def _leave(self) -> None:
        """Closes this process's end of the pipe of its parent's worker, which lives as
        long as any end is open."""
        if self._process_handle.stdin is not None and os.getpid() != self._owner:
            self._process_handle.stdin.close()


_running: weakref.WeakSet[LocalWorker] = weakref.WeakSet()


def _at_exit() -> None:
    """Ends what the program has left: streams, and then workers."""
    loop = GrpcLoop.current()
    if loop is not None and EmbedStream.opened:
        # The end does not depend on it.
        with contextlib.suppress(Exception):
            loop.submit(_close_streams()).result(_STREAMS_GRACE)
    for worker in list(_running):
        worker._finalizer()


async def _close_streams() -> None:
    for stream in list(EmbedStream.opened):
        await stream.close()


atexit.register(_at_exit)


def _after_fork() -> None:
    for worker in list(_running):
        worker._leave()


os.register_at_fork(after_in_child=_after_fork)


class _Log:
    """Log of a worker, read in a thread so that the worker never waits for it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.lines: deque[str] = deque(maxlen=_LOG_LINES)
        self._endpoint: str | None = None
        # Set when the worker is ready, or its log has ended.
        self._known = threading.Event()
        self._is_ready = False
        thread = threading.Thread(target=self._read, name="imagegpt-log", daemon=True)
        thread.start()

    def await_ready(self, timeout: float | None) -> str:
        """Returns the endpoint of the worker once it is ready.

        Raises:
            WorkerStartError: The worker ended, or the time is over.
        """
        is_known = self._known.wait(timeout)
        if self._is_ready and self._endpoint is not None:
            return self._endpoint
        if not is_known:
            text = f"the worker was not ready within {timeout:.0f} s (start_timeout)"
            raise WorkerStartError(text, None, tuple(self.lines))
        try:
            code = self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            raise WorkerStartError(
                "the worker closed its log before it was ready", None, tuple(self.lines)
            ) from None
        text = f"the worker ended with exit code {code} before it was ready"
        raise WorkerStartError(text, code, tuple(self.lines))

    def _read(self) -> None:
        stream = self._process.stderr
        if stream is not None:
            with stream:
                while line := stream.readline(_LINE_BYTES_MAX):
                    self._take(line.decode(errors="replace").rstrip())
        self._known.set()

    def _take(self, line: str) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            self.lines.append(line)
            log.info("%s", line)
            return
        message = str(event.get("message", ""))
        if self._endpoint is None and message == "listening" and "grpc" in event:
            self._endpoint = f"http://{event['grpc']}"
        elif message == "ready":
            self._is_ready = True
        # A model that loads at once may be ready before the line of the address.
        if self._is_ready and self._endpoint is not None:
            self._known.set()
        rest = {
            key: value
            for key, value in event.items()
            if key not in ("timestamp", "level", "message", "target")
        }
        text = " ".join([message, *(f"{key}={value}" for key, value in rest.items())])
        self.lines.append(text)
        log.log(_LEVELS.get(str(event.get("level")), logging.DEBUG), "%s", text)


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """Ends a worker in good order; kills it after the grace period. A fork of the
    program that started the worker leaves it alone."""
    if os.getpid() != owner:
        return
    if process.stdin is not None:
        process.stdin.close()
    # A fork of this program may hold the pipe too. The worker takes both for one
    # request.
    process.terminate()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
