"""Compares a trained model with models/emoji, and puts it there if it is better.

    keep.py DIR               # the output of timed.py: measures, decides, replaces
    keep.py DIR --only-say    # measures and decides

Better means a lower loss on the test split, a head that is more often right on it
(`imagegpt probe fit`, as `make probe` runs it), and weights of at most 16 MiB: see
decisions.py. The loss is measured first, and heads are fitted only if it is lower. The
figures of models/emoji are those in its category.json, and its loss is measured again. The test split is looked at once for each model, and chooses nothing else.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import baselines
import data
import decisions
import network
import numpy as np
import torch
import train
import transformers
from transformers import ImageGPTForCausalImageModeling

# Where the candidate is measured, under the name that its figures are to have.
WORK = data.ROOT / "target" / "train" / "judged"
# Files of the model's directory that belong to its weights.
FILES = (
    "config.json",
    "model.safetensors",
    "curve.json",
    "curve.png",
    "category.safetensors",
    "category.json",
    "category-layers.svg",
    "category-confusion.svg",
    "subcategory.json",
)


def loss(folder: Path, tokens: np.ndarray) -> float:
    model = ImageGPTForCausalImageModeling.from_pretrained(folder, dtype=torch.float32).eval()
    network.check_against_transformers(model)
    return baselines.model_loss(model, tokens)


def figures(folder: Path, held_out_loss: float) -> decisions.Figures:
    head = json.loads((folder / "category.json").read_text())["test"]
    return decisions.Figures(
        loss=held_out_loss,
        accuracy=head["accuracy"],
        log_loss=head["log_loss"],
        size=(folder / "model.safetensors").stat().st_size,
    )


def fit_head(folder: Path) -> None:
    """Fits and measures the heads of a model that is not in models/emoji yet."""
    environment = os.environ | {"MODEL": str(folder), "WORK": str(WORK / "probe"), "TRAIN_VENV": sys.prefix}
    subprocess.run([data.ROOT / "scripts/probe.sh"], env=environment, check=True)


def check_palette(folder: Path) -> None:
    own, other = (json.loads((one / "preprocessor_config.json").read_text()) for one in (data.MODEL, folder))
    if own != other:
        raise SystemExit(f"{folder} has another palette than {data.MODEL}: its tokens mean other colors")


def copied(source: Path) -> Path:
    """A copy of the candidate, which may be where nothing can be written."""
    folder = WORK / data.MODEL.name
    shutil.rmtree(WORK, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "curve.json"):
        shutil.copyfile(source / name, folder / name)
    return folder


def replace(folder: Path) -> None:
    for name in FILES:
        partial = data.MODEL / f"{name}.partial"
        shutil.copyfile(folder / name, partial)
        partial.replace(data.MODEL / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("candidate", type=Path, help="directory that timed.py wrote")
    parser.add_argument("--only-say", action="store_true", help="replace nothing")
    parser.add_argument("--limit", type=int, help="measure losses on this many pictures only, for a quick try")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    folder = copied(arguments.candidate)
    check_palette(folder)
    train.draw_curve(json.loads((folder / "curve.json").read_text()), folder)
    tokens = data.plain_tokens(data.load(), "test", data.Quantizer())[: arguments.limit]
    losses = [loss(where, tokens) for where in (folder, data.MODEL)]
    print(
        f"nats per token on {len(tokens)} emoji of the test split, on white: {losses[0]:.4f}; "
        f"of models/emoji {losses[1]:.4f}",
        flush=True,
    )
    # Heads take minutes, and change nothing any more where the loss is not lower.
    reasons = decisions.loss_against(*losses)
    if not reasons:
        fit_head(folder)
        new, old = figures(folder, losses[0]), figures(data.MODEL, losses[1])
        for name, one in (("candidate", new), ("models/emoji", old)):
            print(
                f"{name:13} head right for {one.accuracy:.2%} of the test split, log loss {one.log_loss:.4f}; "
                f"weights of {one.size / 1e6:.1f} MB"
            )
        reasons = decisions.reasons_against(new, old)
    for reason in reasons:
        print(f"the candidate is not taken: {reason}")
    if reasons:
        print("models/emoji stays as it is")
        return
    if arguments.only_say or arguments.limit:
        print("the candidate is better; nothing was replaced")
        return
    replace(folder)
    print("the candidate is better and is in models/emoji; CONTRIBUTING.md says what to make again")


if __name__ == "__main__":
    main()
