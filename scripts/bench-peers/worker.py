"""`imagegpt serve`, from its start to its end."""

import re
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Self, TextIO

READY_SECONDS = 300
END_SECONDS = 30


class NotReady(Exception):
    """A worker ended, or took too long, before it was ready."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Worker:
    """Context of a worker that is ready; its threads and other settings are flags."""

    def __init__(self, program: str, model: Path, *flags: str, log: TextIO | None = None):
        self.endpoint = f"127.0.0.1:{free_port()}"
        self.metrics = f"127.0.0.1:{free_port()}"
        command = [program, "serve", "--model", str(model), "--execution-provider", "cpu"]
        command += ["--listen", self.endpoint, "--metrics-listen", self.metrics, *flags]
        start = time.monotonic()
        self.process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            self._await(start + READY_SECONDS)
        except BaseException:
            self.end()
            raise
        self.ready_seconds = time.monotonic() - start

    def _await(self, until: float) -> None:
        while True:
            try:
                urllib.request.urlopen(f"http://{self.metrics}/readyz", timeout=5).close()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > until:
                    raise NotReady("imagegpt serve did not become ready; see its log") from None
                time.sleep(0.01)

    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.findall(r"VmRSS:\s+(\d+)", status)[0])

    def cpu_seconds(self) -> float:
        """Returns the time that its threads have had a core, by the scheduler's own count."""
        threads = Path(f"/proc/{self.process.pid}/task").iterdir()
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
