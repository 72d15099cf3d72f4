"""Holds a worker's Generate and Score against transformers on the same weights.

    generate_parity.py --endpoint 127.0.0.1:50051 --checkpoint models/emoji

The worker serves the checkpoint, compiled in fp32 with the tasks score and
generate. Thirty-two primers of different lengths are completed greedily, all at
one time, and must give transformers' generate token for token; log-probabilities
may differ by 1e-4. Scores of the completed images may differ by 1e-4 of the
sum, and by 1e-4 a token from minus the log-probabilities. Where the two
likeliest colors lie nearer to each other than 1e-4 for transformers itself, the
rest of that image is not compared, and the row says so. Ends with "N passed, N
failed"; exits 1 when a check failed.
"""

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import torch
import transformers
from transformers import ImageGPTForCausalImageModeling

sys.path.insert(0, str(Path(__file__).parent))
from parity import Report, load_stubs  # noqa: E402

N_PRIMERS = 32
LOG_PROB_ERROR_MAX = 1e-4
CALL_SECONDS = 600


def primers(n_colors: int, n_positions: int) -> list[list[int]]:
    random = np.random.default_rng(32)
    lengths = [0, 1, n_positions - 1, n_positions // 2]
    lengths += random.integers(2, n_positions - 1, N_PRIMERS - len(lengths)).tolist()
    return [random.integers(0, n_colors, length).tolist() for length in lengths]


def complete(stub, pb, primer: list[int]):
    request = pb.GenerateRequest(prefix=pb.Tokens(ids=primer), temperature=0, log_probs=True, no_rows=True)
    for response in stub.Generate(request, timeout=CALL_SECONDS):
        if response.WhichOneof("message") == "result":
            return response.result.image


def reference(model, primer: list[int]):
    """Tokens, the log-probability of each drawn one, and the least gap between
    the two likeliest colors up to it."""
    start = model.config.vocab_size - 1
    n_positions = model.config.n_positions
    with torch.no_grad():
        context = torch.tensor([[start, *primer]])
        # Its own mask is causal; with all ones it only says that nothing is padding.
        tokens = model.generate(
            input_ids=context, attention_mask=torch.ones_like(context), max_length=n_positions + 1, do_sample=False
        )[0, 1:]
        nll, gaps = score(model, tokens)
    return tokens.tolist(), -nll[len(primer) :], gaps[len(primer) :]


def score(model, tokens):
    start = model.config.vocab_size - 1
    with torch.no_grad():
        logits = model(input_ids=torch.cat([torch.tensor([start]), tokens[:-1]])[None]).logits[0].double()
    top = logits.topk(2, dim=-1).values
    nll = -logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return nll.numpy(), (top[:, 0] - top[:, 1]).numpy()


def run(arguments, scratch: Path) -> int:
    pb, services = load_stubs(scratch)
    model = ImageGPTForCausalImageModeling.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    n_colors, n_positions = model.config.vocab_size - 1, model.config.n_positions
    channel = grpc.insecure_channel(arguments.endpoint)
    stub = services.ImageGptServiceStub(channel)
    report = Report()
    given = primers(n_colors, n_positions)
    started = time.perf_counter()
    with ThreadPoolExecutor(N_PRIMERS) as pool:
        images = list(pool.map(lambda primer: complete(stub, pb, primer), given))
    print(f"{N_PRIMERS} completions at one time: {time.perf_counter() - started:.1f} s")
    failures, log_prob_failures = [], []
    worst, n_ties, n_compared = 0.0, 0, 0
    started = time.perf_counter()
    for primer, image in zip(given, images):
        tokens, log_probs, gaps = reference(model, primer)
        got = list(image.tokens.ids)
        where = next((pixel for pixel in range(n_positions) if got[pixel] != tokens[pixel]), None)
        if where is not None and where >= len(primer) and gaps[where - len(primer)] < LOG_PROB_ERROR_MAX:
            n_ties += 1
        elif where is not None:
            failures.append(f"primer of {len(primer)}: pixel {where} is {got[where]}, not {tokens[where]}")
        n_same = (n_positions if where is None else where) - len(primer)
        n_compared += n_same
        error = np.abs(np.array(image.log_probs[:n_same]) - log_probs[:n_same]).max(initial=0.0)
        worst = max(worst, error)
        if error > LOG_PROB_ERROR_MAX:
            log_prob_failures.append(f"primer of {len(primer)}: {error:.2e}")
    print(f"transformers, one by one: {time.perf_counter() - started:.1f} s; {n_compared} drawn tokens compared")
    report.row(f"greedy completions, mixed lengths ({n_ties} left off at a tie)", N_PRIMERS, "", failures)
    report.row("log-probabilities of drawn tokens", N_PRIMERS, f"{worst:.1e}", log_prob_failures)

    request = pb.ScoreRequest(images=[pb.Image(tokens=image.tokens) for image in images], map=True)
    results = stub.Score(request, timeout=CALL_SECONDS).results
    failures, own_failures, worst, own_worst = [], [], 0.0, 0.0
    for primer, image, result in zip(given, images, results):
        nll, _ = score(model, torch.tensor(list(image.tokens.ids)))
        error = abs(result.score.nats - nll.sum()) / nll.sum()
        worst = max(worst, error)
        if error > 1e-4:
            failures.append(f"{result.score.nats} nats, not {nll.sum()}")
        cells = np.frombuffer(result.score.map.data, "<f4")
        own = np.abs(cells[len(primer) :] + np.array(image.log_probs)).max()
        own_worst = max(own_worst, own)
        if own > LOG_PROB_ERROR_MAX:
            own_failures.append(f"primer of {len(primer)}: {own:.2e}")
    report.row("scores", N_PRIMERS, f"{worst:.1e}", failures)
    report.row("Generate's log-probabilities beside Score's", N_PRIMERS, f"{own_worst:.1e}", own_failures)
    print(f"{report.passed} passed, {report.failed} failed")
    return 1 if report.failed else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--endpoint", required=True, help="host:port of a running worker")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder that the worker's graphs come from")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(run(arguments, Path(scratch)))


if __name__ == "__main__":
    main()
