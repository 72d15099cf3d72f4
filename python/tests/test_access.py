"""TLS, client certificates and tokens."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from fake_worker import FakeWorker

import imagegpt.calls
import imagegpt.stream
from imagegpt import Client, UnavailableError

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with certificates of ``localhost`` and of a client."""
    folder = tmp_path_factory.mktemp("tls")
    for name, subject in (("worker", "localhost"), ("client", "a client")):
        command = [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", f"/CN={subject}", "-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem"),
        ]
        subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture
def worker(files: Path) -> Iterator[FakeWorker]:
    credentials = grpc.ssl_server_credentials(
        [((files / "worker.key").read_bytes(), (files / "worker.pem").read_bytes())],
        root_certificates=(files / "client.pem").read_bytes(),
        require_client_auth=True,
    )
    with FakeWorker(credentials=credentials) as worker:
        yield worker


def test_calls_and_streams_use_tls_with_the_name_of_the_endpoint(
    worker: FakeWorker, files: Path
) -> None:
    with Client(
        f"https://localhost:{worker.port}",
        tls_ca=files / "worker.pem",
        tls_client_cert=files / "client.pem",
        tls_client_key=files / "client.key",
        token="secret",
    ) as client:
        assert client.embed([b"x"]).shape == (1, 4)
        assert len(list(client.embed_stream([b"x", b"y"]))) == 2
    assert {metadata["authorization"] for metadata in worker.metadata} == {"Bearer secret"}


@pytest.mark.parametrize("wrong", ["authority", "client", "plain"])
def test_a_worker_that_cannot_be_trusted_is_an_error_that_says_so(
    worker: FakeWorker, files: Path, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagegpt.calls, "UNAVAILABLE_PATIENCE", 0.5)
    monkeypatch.setattr(imagegpt.stream, "FIRST_PATIENCE", 0.5)
    authority = "client.pem" if wrong == "authority" else "worker.pem"
    if wrong == "plain":
        client = Client(f"http://localhost:{worker.port}")
    elif wrong == "client":
        client = Client(f"localhost:{worker.port}", tls_ca=files / authority)
    else:
        client = Client(
            f"localhost:{worker.port}",
            tls_ca=files / authority,
            tls_client_cert=files / "client.pem",
            tls_client_key=files / "client.key",
        )
    with client:
        with pytest.raises(UnavailableError, match="localhost"):
            client.embed([b"x"])
        with pytest.raises(UnavailableError, match="localhost"):
            list(client.embed_stream([b"x"]))


def test_files_that_cannot_be_read_are_errors_of_the_file_system(tmp_path: Path) -> None:
    missing = tmp_path / "missing.pem"
    with Client("https://localhost:1", tls_ca=missing) as client:
        with pytest.raises(FileNotFoundError, match=r"missing\.pem"):
            client.model()
        with pytest.raises(FileNotFoundError, match=r"missing\.pem"):
            list(client.embed_stream([b"x"]))
    empty = tmp_path / "tokens"
    empty.write_text("# none\n")
    with FakeWorker() as worker, Client(worker.endpoint, token_file=empty) as client:
        with pytest.raises(ValueError, match="has no token"):
            client.model()
        with pytest.raises(ValueError, match="has no token"):
            list(client.embed_stream([b"x"]))
