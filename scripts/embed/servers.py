"""HTTP servers of the scripts here, and what disturbs a server."""

import http.server
import multiprocessing
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from multiprocessing.sharedctypes import RawValue

import common

RANGE = re.compile(r"bytes=(\d+)-(\d*)$")


class Refusal:
    """Time until which servers refuse all requests, for processes that are forked afterwards."""

    def __init__(self):
        # Plain memory: a process may be stopped while it holds a lock.
        self.status, self.until, self.count = RawValue("i", 503), RawValue("d", 0), RawValue("q", 0)

    def begin(self, until: float) -> None:
        self.status.value = random.choice((429, 503))
        # The monotonic clock is the same in all processes.
        self.until.value = until

    def answer(self, handler: BaseHTTPRequestHandler) -> bool:
        """Refuses a request during the time; returns False after it."""
        if time.monotonic() >= self.until.value:
            return False
        self.count.value += 1
        headers = {"Retry_After": "1"} if self.status.value == 429 else {}
        send(handler, self.status.value, **headers)
        return True


class Server(http.server.ThreadingHTTPServer):
    # Connections that wait while the server is stopped: all downloads of the
    # clients that are killed meanwhile.
    request_queue_size = 128

    def handle_error(self, *request):
        # A client that is killed breaks its connections off.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*request)


def serve(answer: Callable[[BaseHTTPRequestHandler], None], refusal: Refusal | None = None) -> str:
    """Serves on threads of this process and returns the URL; `answer` finds the request's body in `body`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Sends headers and a small body at once; apart they wait for each other.
        wbufsize = -1

        def log_message(self, *_):
            pass

        def handle_any(self):
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if refusal is None or not refusal.answer(self):
                answer(self)

        do_GET = do_HEAD = do_POST = handle_any

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def send_content(handler: BaseHTTPRequestHandler, content: bytes, **headers: str) -> None:
    """Sends a file, or the range of it that the request names."""
    wanted = RANGE.match(handler.headers.get("Range", ""))
    if not wanted:
        return send(handler, 200, content, **headers)
    start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
    if start >= len(content):
        return send(handler, 416, Content_Range=f"bytes */{len(content)}")
    headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
    send(handler, 206, content[start : end + 1], **headers)


class ServerProcess:
    """Process in which `begin` serves on threads, until this process ends it or ends; `url` is what `begin` returns."""

    def __init__(self, begin: Callable[[], str]):
        fork = multiprocessing.get_context("fork")
        # Its end here is closed with this process.
        self.pipe, theirs = fork.Pipe()

        def stay() -> None:
            self.pipe.close()
            theirs.send(begin())
            theirs.poll(None)

        self.process = fork.Process(target=stay, daemon=True)
        self.process.start()
        theirs.close()
        self.pid, self.url = self.process.pid, self.pipe.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def disturb(pid: int, refusal: Refusal | None = None) -> None:
    """Stops a server for up to two seconds, or slows it to a fifth of its speed for that
    time, or has it refuse all requests for that time if it has a refusal."""
    seconds = random.uniform(0.2, 2)
    until = time.monotonic() + seconds
    match random.choice(("stop", "slow", "refuse")[: 3 if refusal else 2]):
        case "stop":
            common.stop(pid)
            time.sleep(seconds)
        case "slow":
            while time.monotonic() < until:
                common.stop(pid)
                time.sleep(0.08)
                common.go_on(pid)
                time.sleep(0.02)
        case "refuse":
            refusal.begin(until)
            time.sleep(seconds)
    common.go_on(pid)
