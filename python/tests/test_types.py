"""Types: what a user's type checker sees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import imagegpt

WRONG = """
from imagegpt import Client
Client().embed(["a.png"], pooling="max")
Client().embed(["a.png"], layers="most")
Client().classify(["a.png"])[0].lable
Client().embed([1.5])
number: int = Client().embed(["a.png"])
"""


def mypy(script: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--cache-dir",
            str(script.parent / "cache"),
            script,
        ],
        capture_output=True,
        text=True,
        cwd=script.parent,
        env={"MYPYPATH": str(Path(imagegpt.__file__).parents[1]), "PATH": "/usr/bin:/bin"}
        if "site-packages" not in imagegpt.__file__
        else None,
        timeout=300,
    )


@pytest.mark.slow
def test_a_users_script_is_checked_strictly(tmp_path: Path) -> None:
    good = tmp_path / "user_script.py"
    good.write_text(Path(__file__).with_name("user_script.py").read_text())
    checked = mypy(good)
    assert "user_script.py" not in checked.stdout, checked.stdout
    wrong = tmp_path / "wrong.py"
    wrong.write_text(WRONG)
    errors = [
        line for line in mypy(wrong).stdout.splitlines() if "wrong.py" in line and "error" in line
    ]
    lines = sorted({int(line.split(":")[1]) for line in errors})
    assert lines == [3, 4, 5, 6, 7], errors
