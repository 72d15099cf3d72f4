"""A live worker on this machine, and what it exports."""

import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request

MODEL = "models/untrained"
SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? ")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Worker:
    """`imagegpt serve` with the fake engine, which needs no ONNX Runtime."""

    def __init__(self, binary, cost="1ms", environment=None, grpc=None, metrics=None, flags=()):
        self.grpc, self.metrics = grpc or free_port(), metrics or free_port()
        self.environment = {
            **{name: text for name, text in os.environ.items() if not name.startswith("IMAGEGPT_")},
            **(environment or {}),
        }
        self.process = subprocess.Popen(
            [binary, "serve", "--model", MODEL, "--fake-engine", cost,
             "--listen", f"127.0.0.1:{self.grpc}", "--metrics-listen", f"127.0.0.1:{self.metrics}", *flags],
            env=self.environment, stderr=subprocess.PIPE, text=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()

    def get(self, path):
        """The status and the text of a page; status 0 while nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def until_ready(self, patience=60):
        deadline = time.monotonic() + patience
        while self.get("/readyz")[0] != 200:
            if self.process.poll() is not None:
                raise RuntimeError(f"the worker ended with {self.process.returncode}: "
                                   f"{self.process.stderr.read().strip()}")
            if time.monotonic() > deadline:
                raise RuntimeError("the worker is never ready")
            time.sleep(0.02)
        return self

    def exported(self):
        """Each metric's label values: name -> label -> values."""
        found = {}
        for line in self.get("/metrics")[1].splitlines():
            sample = SAMPLE.match(line)
            if not sample:
                continue
            labels = found.setdefault(sample[1], {})
            for name, value in LABEL.findall(sample[2] or ""):
                labels.setdefault(name, set()).add(value)
        return found
