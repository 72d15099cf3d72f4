"""Server with the calls of the Hugging Face Hub.

It has the calls that huggingface_hub, datasets and `imagegpt embed` use: a revision's
commit, the list of a commit's files in pages, the facts about single paths, and files
by ranges, the large ones from a second address that must never see the token. It
answers as the hub does: 401 with X-Error-Code for what is private or gated, 404 for
what is missing, 429 while it is busy. hub.py holds it against Hugging Face's own
libraries.
"""

import functools
import hashlib
import json
import os
import re
import urllib.parse
from pathlib import Path

import servers
from servers import Refusal, send, send_content

TOKEN = "hf_secret"
PAGE = 2
# Length from which a file is in the storage and not in git.
LARGE = 200
MARKS = re.compile(r"/(revision|tree|resolve|paths-info)/")


class Hub:
    """Datasets by name: revisions, and files by commit."""

    def __init__(self, refusal: Refusal | None = None):
        self.datasets = {}
        self.private, self.gated = set(), set()
        self.requests = {"hub": [], "storage": []}
        self.busy = 0
        self.url = self.serve(self.answer, "hub", refusal)
        self.storage = self.serve(self.store, "storage", refusal)

    def add(self, name: str, revision: str, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        dataset = self.datasets.setdefault(name, {"revisions": {}, "commits": {}})
        dataset["revisions"][revision] = digest
        dataset["commits"][digest] = files
        return digest

    def serve(self, answer, log: str, refusal: Refusal | None) -> str:
        def handle(handler) -> None:
            token = handler.headers.get("Authorization")
            self.requests[log].append((handler.path, token))
            answer(handler, urllib.parse.urlsplit(handler.path), token == f"Bearer {TOKEN}")

        return servers.serve(handle, refusal)

    def store(self, handler, url, _) -> None:
        name, commit, path = urllib.parse.unquote(url.path[1:]).split("|", 2)
        send_content(handler, self.datasets[name]["commits"][commit][path])

    def refuse(self, handler, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        send(handler, status, body, X_Error_Code=code, X_Error_Message=message)

    @staticmethod
    @functools.cache
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
            return send(handler, 429, Retry_After="0")
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
            return send(handler, 200, json.dumps(info).encode())
        if call == "paths-info":
            form = urllib.parse.parse_qs(handler.body.decode())
            wanted = form.get("paths") or json.loads(handler.body).get("paths")
            folders = {entry["path"]: entry for entry in self.entries(files, "", True)}
            found = [folders[path] for path in wanted if path in folders]
            return send(handler, 200, json.dumps(found).encode())
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
            return send(handler, 200, page, **headers)
        if name in self.gated and not has_token:
            message = f"Access to dataset {name} is restricted."
            return self.refuse(handler, 401, "GatedRepo", message)
        if path not in files:
            return self.refuse(handler, 404, "EntryNotFound", "Entry not found")
        content, entry = files[path], self.entry(path, files[path])
        facts = {"X_Repo_Commit": commit, "ETag": f'"{entry["oid"]}"'}
        if "lfs" not in entry:
            return send_content(handler, content, **facts)
        target = urllib.parse.quote(f"{name}|{commit}|{path}")
        send(
            handler,
            302,
            b"moved",
            **facts,
            Location=f"{self.storage}/{target}",
            X_Linked_Size=str(len(content)),
            X_Linked_ETag=f'"{entry["lfs"]["oid"]}"',
        )


def environment(url: str, home: Path) -> dict[str, str]:
    """Returns the environment in which a program reads from the server at `url`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {"HF_ENDPOINT": url, "HF_TOKEN": TOKEN, "HF_HOME": str(home)}
