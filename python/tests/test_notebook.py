"""The notebooks of python/examples run."""

import os
from pathlib import Path

import pytest

import imagegpt

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "python/examples"


@pytest.mark.slow
@pytest.mark.parametrize("folder", [ROOT, EXAMPLES], ids=["root", "examples"])
def test_the_quick_start_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The package that is tested, also in a kernel that is found elsewhere.
    package = str(Path(imagegpt.__file__).parents[1])
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", f"{package}{os.pathsep}{path}" if path else package)
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    printed = [
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    ]
    assert any("same as the probe: True" in text for text in printed)


def test_stored_outputs_are_small() -> None:
    assert (EXAMPLES / "quickstart.ipynb").stat().st_size < 200_000
