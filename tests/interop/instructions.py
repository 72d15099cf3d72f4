"""How many instructions more than the native service the protocol takes.

    python tests/interop/instructions.py --worker target/release/imagegpt --port 50156 --metrics-port 9196

The same requests as overhead.py's, one after the other, to a worker under
valgrind's callgrind: what a call takes is the difference between many calls and
few. Instructions do not depend on what else the machine does, so a percent shows
that times hide; the kernel's are not among them. Exits 1 over --max-percent.
"""

import argparse
import asyncio
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import grpc
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from common import contract  # noqa: E402
from overhead import work  # noqa: E402

pb, pb_grpc = contract()
METHODS = ("/imagegpt.v1.ImageGptService/Embed", "/inference.GRPCInferenceService/ModelInfer")
MODEL = "untrained"
# A start differs from another by a percent or so of what few calls take.
FEW, MANY = 100, 4100


async def call(endpoint, form, protocol, n_calls):
    async with grpc.aio.insecure_channel(endpoint) as channel:
        facts = await pb_grpc.ImageGptServiceStub(channel).GetModel(pb.GetModelRequest())
        requests = work(facts, MODEL, np.random.default_rng(0), n_calls)[form][protocol]
        method = channel.unary_unary(METHODS[protocol])
        for request in requests:
            await method(request)


def await_ready(url, process):
    until = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(url, timeout=1).read()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit("the worker is not ready under valgrind") from None
            time.sleep(0.1)


def instructions(arguments, form, protocol, n_calls):
    """Of a worker that starts, answers so many calls and ends."""
    endpoint, metrics = f"127.0.0.1:{arguments.port}", f"127.0.0.1:{arguments.metrics_port}"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        worker = subprocess.Popen(
            [
                *("valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out"),
                *(f"--log-file={log}", arguments.worker, "serve", "--model", "models/untrained"),
                *("--fake-engine", "0s", "--max-queue-delay", "0s", "--execution-provider", "cpu"),
                *("--listen", endpoint, "--metrics-listen", metrics, "--no-reflection"),
            ],
            stderr=subprocess.DEVNULL,
        )
        try:
            await_ready(f"http://{metrics}/readyz", worker)
            asyncio.run(call(endpoint, form, protocol, n_calls))
        finally:
            worker.terminate()
            worker.wait()
        return int(re.search(r"Collected : (\d+)", log.read_text())[1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--metrics-port", type=int, required=True)
    parser.add_argument("--max-percent", type=float, default=5.0)
    arguments = parser.parse_args()
    worst = 0.0
    for form in ("tokens", "pixels"):
        native, oip = [
            (instructions(arguments, form, protocol, MANY) - instructions(arguments, form, protocol, FEW))
            / (MANY - FEW)
            for protocol in (0, 1)
        ]
        percent = 100 * (oip / native - 1)
        worst = max(worst, percent)
        print(f"{form}: {native:,.0f} instructions a call natively, {oip:,.0f} ({percent:+.1f} %)")
    print(f"overhead {worst:+.1f} %, of {arguments.max_percent:.0f} % allowed")
    sys.exit(worst > arguments.max_percent)


if __name__ == "__main__":
    main()
