"""The settings of scripts/bench-gpu.sh, checked before any work.

    settings.py test    # checks this file itself; tests/it/scripts.rs runs it
"""

import math
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping

ROOT = Path(__file__).resolve().parents[2]

PROVIDERS = ("cuda", "cpu")
SHAPES = ("tiny", "small", "medium", "large")
PRECISIONS = {"cuda": ("fp32", "fp16", "bf16"), "cpu": ("fp32", "int8")}
# Steps of a short time on a device, in their order; `run` stands for all of them.
RUN = (
    "answers", "nan", "seeds", "steps", "primers", "graphs", "copies", "generate", "two", "torch",
    "kernels", "fault",
)  # fmt: skip
STEPS = ("engine", "grpc", "latency", "generate", "cores", "graphs", "soak", "torch")
# Shapes that a GPU is measured with by default; tiny is for a quick try.
DEFAULT_SHAPES = SHAPES[1:]


class Wrong(Exception):
    """A wrong setting; the message names the setting and the allowed values."""


@dataclass(frozen=True)
class Settings:
    program: str
    out: Path
    work: Path | None
    provider: str
    shapes: list[str]
    precisions: list[str]
    steps: list[str]
    budget: float
    soak: float
    batches: list[int]
    slots: int
    cache: str
    images: str
    serve_flags: list[str]
    # True if each step has a limit of its own: with steps that only `run` has.
    is_timed: bool

    def named(self) -> dict:
        """Returns the settings by the names of their variables, for the report."""
        return {
            "PROVIDER": self.provider,
            "SHAPES": self.shapes,
            "PRECISIONS": self.precisions,
            "STEPS": self.steps,
            "BUDGET": self.budget,
            "SOAK": self.soak,
            "BATCHES": ",".join(map(str, self.batches)),
            "SLOTS": self.slots,
            "CACHE": self.cache,
            "IMAGES": self.images,
            "SERVE_FLAGS": self.serve_flags,
        }


def words(name: str, text: str, allowed: tuple[str, ...]) -> list[str]:
    found = text.split()
    wrong = [word for word in found if word not in allowed]
    if wrong or not found:
        raise Wrong(f"{name} has {' '.join(wrong) or 'nothing'}; allowed are {' '.join(allowed)}")
    twice = {word for word in found if found.count(word) > 1}
    if twice:
        raise Wrong(f"{name} has {min(twice)} twice")
    return found


def seconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value <= 86400:
        raise Wrong(f"{name}={text} is not a number of seconds from 1 to 86400")
    return value


def count(name: str, text: str, most: int) -> int:
    # A plain number: int() also takes signs, blanks and other digits.
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= most:
        raise Wrong(f"{name} has {text or 'nothing'}; it must be a number from 1 to {most}")
    return int(text)


def file_or_folder(name: str, text: str, is_there) -> str:
    if not is_there(ROOT / text):
        raise Wrong(f"{name}={text} does not exist")
    return text


def folder_to_make(name: str, text: str) -> Path:
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Wrong(f"{name}={text} cannot be created: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise Wrong(f"{name}={text} cannot be written into")
    return path


def read(environment: Mapping[str, str]) -> Settings:
    def setting(name: str, default: str) -> str:
        return environment.get(name) or default

    provider = setting("PROVIDER", "cuda")
    if provider not in PROVIDERS:
        raise Wrong(f"PROVIDER={provider} is unknown; it must be {' or '.join(PROVIDERS)}")
    precisions = PRECISIONS[provider]
    default = precisions if provider == "cuda" else precisions[:1]
    budget = seconds("BUDGET", setting("BUDGET", "600"))
    batches = setting("BATCHES", "1,2,4,8,16,32,64").split(",")
    cache = setting("CACHE", "24GiB")
    if not re.fullmatch("[0-9]+(\\.[0-9]+)? ?([KMGT]i?)?B?", cache, re.IGNORECASE):
        raise Wrong(f"CACHE={cache} is not a size such as 24GiB")
    asked = setting("STEPS", " ".join(STEPS))
    allowed = (*STEPS, *(step for step in RUN if step not in STEPS))
    if asked.split() == ["run"]:
        asked = " ".join(RUN)
    steps = words("STEPS", asked, allowed)
    found = Settings(
        program=setting("IMAGEGPT", str(ROOT / "target/release/imagegpt")),
        out=Path(setting("OUT", str(ROOT / "target/bench-gpu"))),
        work=None,
        provider=provider,
        shapes=words("SHAPES", setting("SHAPES", " ".join(DEFAULT_SHAPES)), SHAPES),
        precisions=words("PRECISIONS", setting("PRECISIONS", " ".join(default)), precisions),
        steps=steps,
        budget=budget,
        soak=seconds("SOAK", setting("SOAK", str(min(300.0, max(1.0, budget / 4))))),
        batches=sorted({count("BATCHES", size, 65536) for size in batches}),
        slots=count("SLOTS", setting("SLOTS", "256"), 65536),
        cache=cache,
        images=setting("IMAGES", str(ROOT / "models/pictures")),
        serve_flags=environment.get("SERVE_FLAGS", "").split(),
        is_timed=any(step not in STEPS for step in steps),
    )
    if {"cores", "answers", "seeds", "primers", "copies", "kernels"} & set(found.steps):
        file_or_folder("IMAGES", found.images, Path.exists)
    if library := environment.get("ORT_DYLIB_PATH"):
        file_or_folder("ORT_DYLIB_PATH", library, Path.is_file)
    if not shutil.which(found.program):
        raise Wrong(f"IMAGEGPT={found.program} is not a program; run `make build` or name another")
    # Last, so that wrong settings create no directories.
    work = environment.get("WORK")
    folder_to_make("OUT", str(found.out))
    kept = folder_to_make("WORK", work) if work else None
    return Settings(**{**vars(found), "work": kept})


def test() -> None:
    good = {"IMAGEGPT": sys.executable, "OUT": "/tmp", "PROVIDER": "cpu"}

    def check(expected: str, **settings: str) -> None:
        try:
            read({**good, **settings})
        except Wrong as wrong:
            assert expected and expected in str(wrong), (settings, str(wrong))
        else:
            assert not expected, f"{settings} were accepted"

    check("")
    check("", STEPS="soak", SHAPES="tiny small", BATCHES="1,2", BUDGET="30", CACHE="2GiB")
    check("", STEPS="run")
    check("", STEPS="answers fault")
    check("STEPS has run; allowed are engine", STEPS="run engine")
    check("STEPS has nope; allowed are engine", STEPS="nope")
    check("BUDGET=x is not a number", BUDGET="x")
    check("BUDGET=nan is not a number", BUDGET="nan")
    check("SOAK=-3 is not a number", SOAK="-3")
    check("PROVIDER=tpu is unknown; it must be cuda or cpu", PROVIDER="tpu")
    check("SHAPES has nope; allowed are tiny", SHAPES="small nope")
    check("SHAPES has tiny twice", SHAPES="tiny tiny")
    check("STEPS has nothing", STEPS="  ")
    check("PRECISIONS has bf16; allowed are fp32 int8", PRECISIONS="bf16")
    check("PRECISIONS has int8; allowed are fp32 fp16 bf16", PRECISIONS="int8", PROVIDER="cuda")
    check("BATCHES has nothing", BATCHES="1,")
    check("BATCHES has 0", BATCHES="0,1")
    check("SLOTS has many", SLOTS="many")
    check("CACHE=much is not a size", CACHE="much")
    check("IMAGES=/nowhere does not exist", IMAGES="/nowhere")
    check("", IMAGES="/nowhere", STEPS="grpc")
    check("ORT_DYLIB_PATH=/nowhere.so does not exist", ORT_DYLIB_PATH="/nowhere.so")
    check("IMAGEGPT=/nowhere is not a program", IMAGEGPT="/nowhere")
    check("OUT=/proc/nope cannot be created", OUT="/proc/nope")
    print("settings: fine")


if __name__ == "__main__":
    if sys.argv[1:] != ["test"]:
        sys.exit(__doc__)
    test()
