"""Trains models like models/emoji for a given time on a GPU, and writes the best one.

    timed.py --data target/train/emoji.npz --output target/train/candidate --seconds 540

Needs no network: the pictures are in the file of `data.py --prepared`, without the test
split. Trains once for each of --dropouts, in an equal share of the time that is left, by
rounds over the training emoji. After each round the validation loss decides, as decisions.py
says, when the learning rate falls, when the training ends, and which state is the best of
all. The output has the best so far at any moment, as transformers stores models and under
its name only when it is whole, so that a run that is cut loses only what comes after:
model.safetensors (fp16), config.json, curve.json, report.json, and log.jsonl with a line for
each round. keep.py compares it with models/emoji.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import data
import decisions
import network
import numpy as np
import torch
import train
from transformers.utils import logging

STARTED = time.monotonic()
# Kept for the last writing.
RESERVE = 5.0
# A best state is written at most this often; in between it is on the device.
WRITE_EVERY = 5.0


class Best:
    """The state with the lowest validation loss of all trainings, and its files.

    A state that is not written yet is in `weights`, on the device.
    """

    def __init__(self, output: Path, arguments: argparse.Namespace, facts: dict):
        self.output, self.arguments, self.facts = output, arguments, facts
        self.loss, self.weights, self.curve, self.report = math.inf, None, None, None
        self.written = -math.inf
        clusters = data.Quantizer().clusters
        # On the CPU, only to be written.
        self.model = network.make_model(arguments.width, arguments.layers, arguments.heads, clusters, data.SEED)

    def offer(self, loss: float, model, curve: dict, report: dict) -> None:
        if not loss < self.loss:
            return
        self.loss, self.weights = loss, clone(model.state_dict())
        self.curve, self.report = curve, self.facts | report

    def write_if_due(self) -> None:
        if time.monotonic() - self.written >= WRITE_EVERY:
            self.write()

    def write(self) -> None:
        """Writes the state, unless its files are there already."""
        if self.weights is None:
            return
        self.model.load_state_dict(self.weights)
        train.write_model(self.model, self.output)
        self.model.float()
        write_json(self.output / "curve.json", self.curve, None)
        write_json(self.output / "report.json", self.report, 1)
        self.written, self.weights = time.monotonic(), None


def write_json(path: Path, content: dict, indent: int | None) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=indent) + "\n")
    partial.replace(path)


def clone(state):
    """A copy of a state of a model or an optimizer, on the same device."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: clone(value) for key, value in state.items()}
    if isinstance(state, list):
        return [clone(value) for value in state]
    return state


class Run:
    """One training with one share of dropout."""

    def __init__(self, arguments: argparse.Namespace, device: str, seed: int, dropout: float, seconds: float):
        self.arguments, self.device, self.seed, self.dropout = arguments, device, seed, dropout
        clusters = data.Quantizer().clusters
        shape = (arguments.width, arguments.layers, arguments.heads)
        self.model = network.make_model(*shape, clusters, seed).to(device)
        self.optimizers = train.make_optimizers(self.model)
        self.course = decisions.Course(seconds, arguments.patience, arguments.fall)
        self.forward = network.compiled_block_forward if arguments.compile else network.block_forward
        self.began = time.monotonic()
        # Of the state: its steps, and the losses of the rounds that led to it.
        self.step, self.curve = 0, {"train": [], "validation": []}
        self.kept: list | None = None
        # Of this run, with those that led to no state that was taken up again.
        self.n_pictures = 0

    def now(self) -> float:
        return time.monotonic() - self.began

    def keep(self) -> None:
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        self.kept = clone([self.model.state_dict(), states, self.step, self.curve])

    def restore(self) -> None:
        weights, states, self.step, self.curve = clone(self.kept)
        self.model.load_state_dict(weights)
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)

    def round(self, batches, n_steps: int) -> float | None:
        """One round over the training emoji, or its beginning; the mean of the losses."""
        losses = []
        for _ in range(n_steps):
            if losses and self.course.is_over(self.now()):
                break
            share = self.course.rate(self.now()) * min(1.0, (self.step + 1) / train.WARM_UP_STEPS)
            ids = next(batches).to(self.device)
            losses.append(train.learn(self.model, self.optimizers, ids, share, self.forward, self.dropout))
            self.step += 1
            self.n_pictures += len(ids)
        # Only here does this process wait for the device.
        return torch.stack(losses).mean().item()

    def train(self, batches, n_steps: int, validation: np.ndarray, best: Best, log) -> None:
        number, then = 0, "on"
        while then != "end":
            value = self.round(batches, n_steps)
            number += 1
            loss = train.held_out_loss(
                self.model, validation, self.device, torch.bfloat16, self.forward, self.arguments.batch
            )
            decision = self.course.after(loss, self.now())
            then = decision.then if math.isfinite(value) else "end"
            entry = {
                "dropout": self.dropout,
                "round": number,
                "step": self.step,
                "train": rounded(value),
                "validation": rounded(loss),
                "is_best": decision.is_best,
                "then": then,
                "seconds": round(self.now(), 2),
                "pictures_per_second": round(self.n_pictures / self.now(), 1),
            }
            log.write(json.dumps(entry) + "\n")
            log.flush()
            print(json.dumps(entry), flush=True)
            if decision.is_restored:
                self.restore()
            else:
                self.curve["train"].append([self.step, rounded(value)])
                self.curve["validation"].append([self.step, rounded(loss)])
            if decision.is_best:
                self.keep()
                curve = clone(self.curve) | {"batch": self.arguments.batch, "seconds": round(self.now())}
                best.offer(loss, self.model, curve, entry)
            best.write_if_due()


def batches_of(pictures: train.Batches, n_workers: int) -> Iterator[torch.Tensor]:
    """The batches in their order, made by processes where these can share memory."""
    if n_workers:
        # A minute is enough for the first batch of a busy machine.
        loader = torch.utils.data.DataLoader(
            pictures, batch_size=None, num_workers=n_workers, prefetch_factor=4, timeout=60
        )
        batches = iter(loader)
        try:
            first = next(batches)
        except (RuntimeError, OSError) as error:
            print(f"pictures are made in this process: {error}", flush=True)
        else:
            return itertools.chain([first], batches)
    return iter(torch.utils.data.DataLoader(pictures, batch_size=None))


def rounded(value: float) -> float | None:
    """Four digits; JSON has no infinity and no NaN."""
    return round(value, 4) if math.isfinite(value) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="file of `data.py --prepared`")
    parser.add_argument("--output", type=Path, required=True, help="directory for the best model")
    parser.add_argument("--seconds", type=float, default=540.0, help="time for everything, from the start")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: cuda if there is one")
    # 13.6 MB in fp16, below the limit of 16 MiB; heads of 32 and 8 layers as today.
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64, help="pictures per step")
    parser.add_argument("--dropouts", type=float, nargs="+", default=[0.1, 0.0, 0.2], help="a training for each")
    parser.add_argument("--patience", type=int, default=30, help="rounds without a lower validation loss")
    parser.add_argument("--fall", type=float, default=0.4, help="last share of a training, in which the rate falls")
    parser.add_argument("--workers", type=int, help="processes that make pictures [a core less than there are]")
    parser.add_argument("--compile", action="store_true", help="use torch.compile, which takes a minute at first")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    logging.disable_progress_bar()
    arguments.output.mkdir(parents=True, exist_ok=True)
    shutil.copy(data.MODEL / "preprocessor_config.json", arguments.output)
    emoji = data.load_prepared(arguments.data)
    validation = data.plain_tokens(emoji, "validation", data.Quantizer())
    n_train = sum(one.split == "train" for one in emoji)
    n_steps = max(1, n_train // arguments.batch)
    facts = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "shape": [arguments.width, arguments.layers, arguments.heads],
        "batch": arguments.batch,
        "training_emoji": n_train,
    }
    best = Best(arguments.output, arguments, facts)
    network.check_against_transformers(best.model)
    n_parameters = sum(parameter.numel() for parameter in best.model.parameters())
    print(f"{n_parameters / 1e6:.2f} M parameters on {facts['device']}; {facts}", flush=True)
    n_workers = len(os.sched_getaffinity(0)) - 1 if arguments.workers is None else arguments.workers
    with (arguments.output / "log.jsonl").open("w") as log:
        for idx, dropout in enumerate(arguments.dropouts):
            left = arguments.seconds - RESERVE - (time.monotonic() - STARTED)
            seconds = decisions.share(left, len(arguments.dropouts) - idx)
            if left < 1:
                print(f"no time is left for a dropout of {dropout}", flush=True)
                break
            run = Run(arguments, device, data.SEED + idx, dropout, seconds)
            torch.manual_seed(data.SEED + idx)
            pictures = train.Batches(emoji, 0, train.STEPS_MAX, arguments.batch, data.SEED + idx)
            run.train(batches_of(pictures, n_workers), n_steps, validation, best, log)
            best.write()
            print(f"dropout {dropout}: the best of all so far has {best.loss:.4f} nats per token", flush=True)
    print(f"wrote {arguments.output} in {time.monotonic() - STARTED:.0f} s")


if __name__ == "__main__":
    main()
