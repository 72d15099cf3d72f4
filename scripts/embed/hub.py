"""Holds a server of the scripts here, with the calls of the Hugging Face Hub, against
huggingface_hub and datasets, and then reads the same datasets with `imagegpt embed`.

    hub.py

The server is that of hub_server.py, which answers 429 once in a while. First
HfFileSystem and `datasets.load_dataset` read every dataset and compare every byte, so
that the server speaks as the hub does; then `imagegpt embed hf://…` must write the
table that it writes from a copy on a disk.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import urllib.parse
from pathlib import Path

import common
import hub_server
from hub_server import Hub

ROOT = common.ROOT / "target" / "embed-hub"
IMAGES = 130
PER_FILE = 50


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
    env = hub_server.environment(hub.url, ROOT / "home")
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
