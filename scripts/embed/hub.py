"""Holds a server of this script, with the calls of the Hugging Face Hub, against
huggingface_hub and datasets, and then reads the same datasets with `imagegpt embed`.

    hub.py

The server has the calls that both use: a revision's commit, the list of a commit's
files in pages, the facts about single paths, and files by ranges, the large ones from
a second address that must never see the token. It answers as the hub does: 401 with
X-Error-Code for what is private or gated, 404 for what is missing, 429 once in a
while. First HfFileSystem and `datasets.load_dataset` read every dataset and compare
every byte, so that the server speaks as the hub does; then `imagegpt embed hf://…`
must write the table that it writes from a copy on a disk.
"""

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import common

ROOT = common.ROOT / "target" / "embed-hub"
TOKEN = "hf_secret"
IMAGES = 130
PER_FILE = 50
PAGE = 2
# Length from which a file is in the storage and not in git.
LARGE = 200
MARKS = re.compile(r"/(revision|tree|resolve|paths-info)/")
RANGE = re.compile(r"bytes=(\d+)-(\d*)$")


class Hub:
    """Datasets by name: revisions, and files by commit."""

    def __init__(self):
        self.datasets = {}
        self.private, self.gated = set(), set()
        self.requests = {"hub": [], "storage": []}
        self.busy = 0
        self.url = self.serve(self.answer, "hub")
        self.storage = self.serve(self.store, "storage")

    def add(self, name: str, revision: str, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        dataset = self.datasets.setdefault(name, {"revisions": {}, "commits": {}})
        dataset["revisions"][revision] = digest
        dataset["commits"][digest] = files
        return digest

    def serve(self, answer, log: str) -> str:
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def handle_any(self):
                length = int(self.headers.get("Content-Length") or 0)
                self.body = self.rfile.read(length)
                has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                hub.requests[log].append((self.path, self.headers.get("Authorization")))
                answer(self, urllib.parse.urlsplit(self.path), has_token)

            do_GET = do_HEAD = do_POST = handle_any

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    @staticmethod
    def send(handler, status: int, body: bytes = b"", **headers: str) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)

    def content(self, handler, content: bytes, **headers: str) -> None:
        wanted = RANGE.match(handler.headers.get("Range", ""))
        if not wanted:
            return self.send(handler, 200, content, **headers)
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if start >= len(content):
            return self.send(handler, 416, Content_Range=f"bytes */{len(content)}")
        headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
        self.send(handler, 206, content[start : end + 1], **headers)

    def store(self, handler, url, _) -> None:
        name, commit, path = urllib.parse.unquote(url.path[1:]).split("|", 2)
        self.content(handler, self.datasets[name]["commits"][commit][path])

    def refuse(self, handler, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self.send(handler, status, body, X_Error_Code=code, X_Error_Message=message)

    @staticmethod
    def entry(path: str, content: bytes) -> dict:
        digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"type": "file", "oid": digest, "size": len(content), "path": path}
        if len(content) >= LARGE:
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
        return entry

    def entries(self, files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
        prefix = f"{folder}/" if folder else ""
        found, folders = [], set()
        for path, content in sorted(files.items()):
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                folders.add(prefix + "/".join(parts[:depth]))
            if recursive or len(parts) == 1:
                found.append(self.entry(path, content))
        tree = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in folders]
        return sorted(tree + found, key=lambda entry: entry["path"])

    def answer(self, handler, url, has_token: bool) -> None:
        if self.busy > 0:
            self.busy -= 1
            return self.send(handler, 429, Retry_After="0")
        query = urllib.parse.parse_qs(url.query)
        is_call = url.path.startswith("/api/datasets/")
        rest = url.path.removeprefix("/api/datasets/" if is_call else "/datasets/")
        mark = MARKS.search(rest)
        name, call = (rest[: mark.start()], mark[1]) if mark else (rest, "revision")
        revision, _, path = (rest[mark.end() :] if mark else "main").partition("/")
        revision, path = urllib.parse.unquote(revision), urllib.parse.unquote(path)
        dataset = self.datasets.get(name)
        if dataset is None or (name in self.private and not has_token):
            message = "Invalid username or password."
            return self.refuse(handler, 401, "RepoNotFound", message)
        commit = dataset["revisions"].get(revision, revision)
        files = dataset["commits"].get(commit)
        if files is None:
            return self.refuse(handler, 404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if call == "revision":
            info = {"_id": "1", "id": name, "sha": commit, "private": False, "gated": False}
            if "expand" not in query:
                info["siblings"] = [{"rfilename": path} for path in sorted(files)]
            return self.send(handler, 200, json.dumps(info).encode())
        if call == "paths-info":
            form = urllib.parse.parse_qs(handler.body.decode())
            wanted = form.get("paths") or json.loads(handler.body).get("paths")
            folders = {entry["path"]: entry for entry in self.entries(files, "", True)}
            found = [folders[path] for path in wanted if path in folders]
            return self.send(handler, 200, json.dumps(found).encode())
        if call == "tree":
            found = self.entries(files, path, query.get("recursive", [""])[0].lower() == "true")
            if not found:
                message = f"{path} does not exist on {revision}"
                return self.refuse(handler, 404, "EntryNotFound", message)
            start = int(query.get("cursor", ["0"])[0])
            headers = {}
            if start + PAGE < len(found):
                query["cursor"] = [str(start + PAGE)]
                target = f"{self.url}{url.path}?{urllib.parse.urlencode(query, doseq=True)}"
                headers["Link"] = f'<{target}>; rel="next"'
            page = json.dumps(found[start : start + PAGE]).encode()
            return self.send(handler, 200, page, **headers)
        if name in self.gated and not has_token:
            message = f"Access to dataset {name} is restricted."
            return self.refuse(handler, 401, "GatedRepo", message)
        if path not in files:
            return self.refuse(handler, 404, "EntryNotFound", "Entry not found")
        content, entry = files[path], self.entry(path, files[path])
        facts = {"X_Repo_Commit": commit, "ETag": f'"{entry["oid"]}"'}
        if "lfs" not in entry:
            return self.content(handler, content, **facts)
        target = urllib.parse.quote(f"{name}|{commit}|{path}")
        self.send(
            handler,
            302,
            b"moved",
            **facts,
            Location=f"{self.storage}/{target}",
            X_Linked_Size=str(len(content)),
            X_Linked_ETag=f'"{entry["lfs"]["oid"]}"',
        )


def make(hub: Hub) -> None:
    parquet = common.make_parquet(ROOT / "parquet", IMAGES, PER_FILE)
    tars = common.make_tars(ROOT / "tars", IMAGES, PER_FILE)
    shards = {f"data/train-{path.name}": path.read_bytes() for path in parquet}
    card = {"README.md": b"# Pictures\n", ".gitattributes": b"*.parquet filter=lfs\n"}
    hub.add("team/parquet", "main", card | shards)
    hub.add("team/parquet", "v1/a", card | dict(list(shards.items())[:1]))
    hub.add("team/private", "main", card | shards)
    hub.private.add("team/private")
    hub.add("team/gated", "main", card | shards)
    hub.gated.add("team/gated")
    hub.add("team/tars", "main", card | {f"t/{path.name}": path.read_bytes() for path in tars})
    pictures = {f"train/a #{number}.png": common.picture(number) for number in range(12)}
    hub.add("team/pictures", "main", card | pictures)
    # As the model card's own example: a script, and the hub's conversion.
    hub.add("huggingface/cats-image", "main", card | {"cats-image.py": b"import datasets\n"})
    converted = {"default/test/0000.parquet": parquet[0].read_bytes()}
    hub.add("huggingface/cats-image", "refs/convert/parquet", converted)


SOURCES = {
    "parquet": "team/parquet",
    "file": "team/parquet/data/train-0001.parquet",
    "revision": "team/parquet@v1%2Fa",
    "private": "team/private",
    "gated": "team/gated/data",
    "tars": "team/tars",
    "pictures": "team/pictures",
    "cats": "huggingface/cats-image",
}


def hold_against_others() -> None:
    """Runs in a process of its own, whose environment names the server."""
    import datasets
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    expected = json.loads((ROOT / "expected.json").read_text())
    files = HfFileSystem()
    for name, revisions in expected.items():
        for revision, digests in revisions.items():
            base = f"datasets/{name}@{urllib.parse.quote(revision, safe='')}"
            found = {path.removeprefix(f"{base}/") for path in files.find(base)}
            if found != set(digests):
                raise SystemExit(f"{base}: HfFileSystem lists {sorted(found)}")
            for path, digest in digests.items():
                content = files.cat_file(f"{base}/{path}")
                half = files.cat_file(f"{base}/{path}", start=len(content) // 2)
                if hashlib.sha256(content).hexdigest() != digest or not content.endswith(half):
                    raise SystemExit(f"{base}/{path}: HfFileSystem reads other bytes")
                if files.info(f"{base}/{path}")["size"] != len(content):
                    raise SystemExit(f"{base}/{path}: HfFileSystem states another size")
    for name, revision, kind in (
        ("team/none", "main", RepositoryNotFoundError),
        ("team/parquet", "v9", RevisionNotFoundError),
    ):
        try:
            HfApi().dataset_info(name, revision=revision)
            raise SystemExit(f"{name}@{revision} is found")
        except kind:
            pass
    for name, error in (("team/private", RepositoryNotFoundError), ("team/gated", GatedRepoError)):
        try:
            HfApi(token=False).hf_hub_download(
                name, "data/train-0000.parquet", repo_type="dataset", token=False
            )
            raise SystemExit(f"{name} can be read without a token")
        except error:
            pass
    rows = datasets.load_dataset("team/parquet", split="train")
    if rows.num_rows != IMAGES or rows.column_names != ["image", "key", "label"]:
        raise SystemExit(f"datasets reads {rows}")
    print(f"huggingface_hub and datasets read {len(expected)} datasets", flush=True)


def table(output: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if path.is_file() and name.startswith(("part-", "errors/")):
            found[name] = path.read_bytes()
    return found


def copy(hub: Hub, what: str) -> Path:
    """Makes the copy on a disk of an input; returns the directory or the file."""
    name, _, rest = SOURCES[what].partition("@")
    revision = urllib.parse.unquote(rest) or "main"
    owner, name, *below = name.split("/")
    name = f"{owner}/{name}"
    if what == "cats":
        revision = "refs/convert/parquet"
    dataset = hub.datasets[name]
    at = ROOT / "copies" / what
    for path, content in dataset["commits"][dataset["revisions"][revision]].items():
        (at / path).parent.mkdir(parents=True, exist_ok=True)
        (at / path).write_bytes(content)
    return at.joinpath(*below)


def compare(hub: Hub, worker: common.Worker, env: dict[str, str]) -> None:
    for what, source in SOURCES.items():
        outputs = [ROOT / "out" / f"{side}-{what}" for side in ("disk", "hub")]
        common.run(str(copy(hub, what)), str(outputs[0]), [worker], "--part-items", "20")
        hub.busy = 2
        source = f"hf://datasets/{source}"
        common.run(source, str(outputs[1]), [worker], "--part-items", "20", env=env)
        disk, remote = map(table, outputs)
        if disk != remote or not disk:
            raise SystemExit(f"{source}: the table differs from that of a disk")
        print(f"{source}: {len(disk)} files as from a disk", flush=True)


def refused(worker: common.Worker, env: dict[str, str]) -> None:
    env = {name: value for name, value in env.items() if name != "HF_TOKEN"}
    for source, text in (
        ("team/gated", "is gated"),
        ("team/private", "or it is private"),
        ("team/none", "has no dataset team/none"),
        ("team/parquet@v9", "has no revision v9"),
        ("team/parquet/none", "has no file or directory none"),
    ):
        output = str(ROOT / "out" / "refused")
        command = common.command(f"hf://datasets/{source}", output, [worker])
        ended = subprocess.run(command, capture_output=True, text=True, env=env)
        if ended.returncode != 2 or text not in ended.stderr:
            raise SystemExit(f"{source}: {ended.returncode}: {ended.stderr}")
        print(f"{source}: refused: {text}", flush=True)


def main() -> None:
    for name in ("out", "copies", "home"):
        shutil.rmtree(ROOT / name, ignore_errors=True)
    hub = Hub()
    make(hub)
    digests = {
        name: {
            revision: {
                path: hashlib.sha256(content).hexdigest()
                for path, content in dataset["commits"][commit].items()
            }
            for revision, commit in dataset["revisions"].items()
        }
        for name, dataset in hub.datasets.items()
    }
    (ROOT / "expected.json").write_text(json.dumps(digests))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env = kept | {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(ROOT / "home")}
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    subprocess.run([sys.executable, __file__, "--hold"], check=True, env=env | quiet)
    # What those send to the storage is their own affair.
    hub.requests["storage"].clear()
    worker = common.Worker("--model", str(common.ROOT / "models/untrained"), "--fake-engine", "0s")
    try:
        compare(hub, worker, env)
        refused(worker, env)
    finally:
        worker.kill()
    if not hub.requests["storage"] or any(token for _, token in hub.requests["storage"]):
        raise SystemExit("the storage was not asked, or has seen the token")
    print(f"{len(hub.requests['storage'])} requests of the storage, none with the token")


if __name__ == "__main__":
    if sys.argv[1:] == ["--hold"]:
        hold_against_others()
    else:
        main()
