"""Reads and writes datasets in every store of `imagegpt embed`, and compares the
tables with those of a disk.

    stores.py                   # HTTP, Google's and Azure's, each with a server of its own here
    stores.py --only http,az

The datasets are 130 images as WebDataset and as Parquet, and 30 as single files.
HTTP: a server of this script that supports range requests, and Python's own, which
does not. Azure: Azurite (npm install --prefix target/azurite azurite), which is
read, listed and written. Google: gcp-storage-emulator, which supports neither
listing nor multipart uploads, which a directory needs; so named files are read, and
the table is written to a disk. chaos.py tests S3.
"""

import argparse
import email.utils
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from functools import partial
from pathlib import Path

import common

IMAGES = 130
PER_SHARD = 50
FLAGS = ("--part-items", "20", "--id-column", "key")
ROOT = common.ROOT / "target" / "embed-stores"
AZURITE = common.ROOT / "target" / "azurite" / "node_modules" / ".bin" / "azurite-blob"
# Azurite's published key, which is no secret.
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
RANGE = re.compile(r"bytes=(\d+)-(\d*)$")


def make() -> dict[str, list[Path]]:
    """Makes the images in every layout; returns the files by directory."""
    tars = common.make_tars(ROOT / "tars", IMAGES, PER_SHARD)
    parquet = common.make_parquet(ROOT / "parquet", IMAGES, PER_SHARD)
    files = []
    (ROOT / "files").mkdir(exist_ok=True)
    for number in range(30):
        path = ROOT / "files" / f"{common.key(number)} #{number}.png"
        path.write_bytes(common.image(number))
        files.append(path)
    listed = ROOT / "files" / "list.txt"
    listed.write_text("".join(f"{path.name}\n" for path in files) + "gone.png\n")
    return {"tars": tars, "parquet": parquet, "files": [*files, listed]}


def seen(name: str, content: bytes) -> bytes:
    """Returns what must be equal of a file: all of it, but messages of errors, which have what a store said."""
    if not name.startswith("errors/"):
        return content
    lines = [json.loads(line) for line in content.splitlines()]
    return json.dumps([(line["id"], line["code"]) for line in lines]).encode()


def table(output: Path) -> dict[str, bytes]:
    """Returns the files that a job wrote, without those that name its input."""
    found = {}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if path.is_file() and name.startswith(("part-", "errors/")):
            found[name] = seen(name, path.read_bytes())
    return found


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Python's server with support for range requests, which it lacks."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        wanted = RANGE.match(self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if not wanted or not path.is_file():
            return super().do_GET()
        content = path.read_bytes()
        start = int(wanted[1])
        end = min(int(wanted[2] or len(content) - 1), len(content) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        self.send_header("Content-Length", str(end - start + 1))
        self.end_headers()
        self.wfile.write(content[start : end + 1])


class Plain(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def serve(handler) -> str:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=ROOT))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


class Check:
    """Runs jobs whose tables must equal those of jobs from a disk."""

    def __init__(self, worker: common.Worker):
        self.worker = worker
        self.expected = {}
        for what, source in self.sources(str(ROOT)).items():
            self.run(f"disk-{what}", source)
            self.expected[what] = table(ROOT / "out" / f"disk-{what}")

    @staticmethod
    def sources(base: str) -> dict[str, str]:
        last = (IMAGES - 1) // PER_SHARD
        return {
            "tars": f"{base}/tars/{{0000..{last:04}}}.tar",
            "parquet": f"{base}/parquet/{{0000..{last:04}}}.parquet",
            "list": f"{base}/files/list.txt",
        }

    def run(self, name: str, source: str, output: str | None = None, env=None) -> None:
        output = output or str(ROOT / "out" / name)
        env = {**os.environ, **(env or {})}
        common.run(source, output, [self.worker], *FLAGS, env=env)

    def compare(self, store: str, what: str, got: dict[str, bytes]) -> None:
        if got != self.expected[what]:
            raise SystemExit(f"{store}, {what}: the table differs from that of a disk")
        print(f"{store}, {what}: {len(got)} files as from a disk", flush=True)

    def read(self, store: str, base: str, whats, env=None) -> None:
        for what in whats:
            name = f"{store}-{what}"
            self.run(name, self.sources(base)[what], env=env)
            self.compare(store, what, table(ROOT / "out" / name))


def over_http(check: Check) -> None:
    check.read("http", serve(Ranges), ("tars", "parquet", "list"))
    # Without range requests, whole files can be read, and each shard is an error
    # with the reason.
    plain = serve(Plain)
    check.read("http-plain", plain, ("list",))
    command = common.command(
        check.sources(plain)["tars"], str(ROOT / "out" / "plain"), [check.worker], *FLAGS
    )
    ended = subprocess.run(command, capture_output=True, text=True)
    errors = (ROOT / "out" / "plain" / "errors").glob("*.jsonl")
    lines = [json.loads(line) for path in errors for line in path.read_text().splitlines()]
    if ended.returncode != 0 or not lines or any("range of bytes" not in line["message"] for line in lines):
        raise SystemExit(f"http-plain: {ended.returncode}: {ended.stderr}")
    print("http-plain, tars: one error each, since the server has no ranges", flush=True)


def google(check: Check, made: dict[str, list[Path]]) -> None:
    from gcp_storage_emulator import server as emulator

    class Bodiless:
        """Answers a HEAD request, which the emulator does not support, with GET's headers."""

        def __init__(self, file):
            self.file, self.is_body = file, False

        def write(self, content):
            if not self.is_body:
                self.file.write(content)
            self.is_body = self.is_body or content.endswith(b"\r\n\r\n")

    def do_HEAD(handler):
        handler.wfile, file = Bodiless(handler.wfile), handler.wfile
        emulator.Router(handler).handle("GET")
        handler.wfile = file

    def end_headers(handler):
        # Google's servers always send both headers.
        handler.send_header("Last-Modified", email.utils.formatdate(0, usegmt=True))
        handler.send_header("ETag", '"1"')
        http.server.BaseHTTPRequestHandler.end_headers(handler)

    emulator.RequestHandler.do_HEAD = do_HEAD
    emulator.RequestHandler.end_headers = end_headers
    port = common.free_port()
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="images")
    server.start()
    url = f"http://127.0.0.1:{port}"
    try:
        for folder, paths in made.items():
            for path in paths:
                at = f"{url}/images/{folder}/{urllib.request.quote(path.name)}"
                put = urllib.request.Request(at, data=path.read_bytes(), method="PUT")
                urllib.request.urlopen(put).read()
        env = {
            "GOOGLE_BASE_URL": url,
            "GOOGLE_SKIP_SIGNATURE": "true",
            "GOOGLE_ALLOW_HTTP": "true",
        }
        check.read("gs", "gs://images", ("tars", "parquet", "list"), env)
    finally:
        server.stop()


def azure(check: Check, made: dict[str, list[Path]]) -> None:
    from azure.storage.blob import BlobServiceClient

    if not AZURITE.exists():
        raise SystemExit(f"{AZURITE} does not exist; run npm install --prefix target/azurite azurite")
    port = common.free_port()
    server = subprocess.Popen(
        [AZURITE, "--blobPort", str(port), "--inMemoryPersistence", "--skipApiVersionCheck"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}"
    try:
        # Azurite answers 400 to a page that does not exist, so only its port is
        # awaited.
        common.await_port(port, server)
        client = BlobServiceClient(url, credential=AZURE_KEY)
        images, out = client.create_container("images"), client.create_container("out")
        for folder, paths in made.items():
            for path in paths:
                images.upload_blob(f"{folder}/{path.name}", path.read_bytes())
        env = {
            "AZURE_STORAGE_USE_EMULATOR": "true",
            "AZURITE_BLOB_STORAGE_URL": f"http://127.0.0.1:{port}",
            "AZURE_STORAGE_ACCOUNT_NAME": AZURE_ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY,
        }
        check.read("az", "az://images", ("tars", "parquet", "list"), env)
        # A directory is listed, and the table is written to Azure, too.
        check.run("az", "az://images/tars", "az://out/table", env)
        got = {}
        for blob in out.list_blobs(name_starts_with="table/"):
            name = blob.name.removeprefix("table/")
            if name.startswith(("part-", "errors/")):
                got[name] = seen(name, out.download_blob(blob.name).readall())
        check.compare("az, written and listed", "tars", got)
        # The same job has nothing left to do.
        check.run("az", "az://images/tars", "az://out/table", env)
    finally:
        server.kill()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="http,gs,az")
    arguments = parser.parse_args()
    only = arguments.only.split(",")
    shutil.rmtree(ROOT / "out", ignore_errors=True)
    made = make()
    worker = common.Worker("--model", str(common.ROOT / "models/untrained"), "--fake-engine", "0s")
    try:
        check = Check(worker)
        if "http" in only:
            over_http(check)
        if "gs" in only:
            google(check, made)
        if "az" in only:
            azure(check, made)
    finally:
        worker.kill()


if __name__ == "__main__":
    main()
