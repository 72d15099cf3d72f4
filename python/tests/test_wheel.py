"""The package as pip has installed it from its wheel (``make python-test``)."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.wheel

DISTRIBUTION = "imagegpt"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def program() -> Path:
    """Returns the program of the environment in which the tests run."""
    return Path(sysconfig.get_path("scripts")) / "imagegpt"


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the program with nothing in its environment that names a library."""
    hidden = ("ORT_DYLIB_PATH", "LD_LIBRARY_PATH")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        [program, *arguments], env=env, capture_output=True, text=True, timeout=120, check=False
    )


def names() -> list[str]:
    """Returns the names of the files in the wheel that was installed."""
    with zipfile.ZipFile(os.environ["IMAGEGPT_WHEEL"]) as wheel:
        return wheel.namelist()


def test_all_versions_are_that_of_cargo(program: Path) -> None:
    text = (REPOSITORY / "Cargo.toml").read_text()
    match = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    assert match is not None
    version = match[1]
    assert importlib.metadata.version(DISTRIBUTION) == version
    assert run(program, "--version").stdout == f"imagegpt {version}\n"
    import imagegpt

    assert imagegpt.__version__ == version


def test_the_program_is_on_the_path_of_the_environment(program: Path) -> None:
    assert program.is_file()
    path = str(program.parent)
    assert shutil.which("imagegpt", path=path) == str(program)
    with program.open("rb") as file:
        assert file.read(4) == b"\x7fELF", "no wrapper in Python"


def test_the_package_is_the_installed_one() -> None:
    import imagegpt

    packages = Path(sysconfig.get_path("platlib")).resolve()
    assert packages in Path(imagegpt.__file__).resolve().parents


def test_the_program_finds_the_onnx_runtime_of_its_environment(program: Path) -> None:
    output = run(program, "doctor", "--execution-provider", "cpu", "--format", "json")
    report = json.loads(output.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    found = checks["ONNX Runtime"]
    version = importlib.metadata.version("onnxruntime")
    folder = Path(sysconfig.get_path("platlib")) / "onnxruntime/capi"
    assert f"{folder}/libonnxruntime.so.{version}" in found["found"]
    assert checks["inference on cpu"]["result"] == "ok", checks
    assert output.returncode == 0


def test_the_wheel_has_what_it_needs_and_nothing_else() -> None:
    version = importlib.metadata.version(DISTRIBUTION)
    allowed = re.compile(
        rf"imagegpt/(?:\w+/)*\w+\.pyi?|imagegpt/py\.typed"
        rf"|imagegpt-{version}\.data/scripts/imagegpt"
        rf"|imagegpt-{version}\.dist-info/"
        r"(?:METADATA|WHEEL|RECORD|licenses/LICENSE|sboms/[\w.-]+\.cyclonedx\.json)"
    )
    others = [name for name in names() if not allowed.fullmatch(name)]
    assert others == []
    generated = ("imagegpt_pb2.py", "imagegpt_pb2.pyi", "imagegpt_pb2_grpc.py", "__init__.py")
    needed = {
        "imagegpt/__init__.py",
        "imagegpt/py.typed",
        f"imagegpt-{version}.data/scripts/imagegpt",
        f"imagegpt-{version}.dist-info/licenses/LICENSE",
        *(f"imagegpt/v1/{name}" for name in generated),
    }
    assert needed <= set(names())


def test_every_source_is_in_the_wheel() -> None:
    sources = REPOSITORY / "python/src"
    python = {
        str(path.relative_to(sources))
        for path in sources.rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert python <= set(names())


def test_one_wheel_is_for_every_python() -> None:
    name = Path(os.environ["IMAGEGPT_WHEEL"]).name
    version = importlib.metadata.version(DISTRIBUTION)
    assert re.fullmatch(rf"imagegpt-{version}-py3-none-manylinux_\d+_\d+_\w+\.whl", name)


def test_the_extras_are_those_of_the_readme() -> None:
    metadata = importlib.metadata.metadata(DISTRIBUTION)
    readme = (REPOSITORY / "python/README.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \|", readme, re.MULTILINE)
    assert sorted(metadata.get_all("Provides-Extra") or []) == sorted(rows)
    assert metadata["License-Expression"] == "Apache-2.0"
