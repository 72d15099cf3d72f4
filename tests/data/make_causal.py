"""Makes tests/data/models/micro-causal: a small ImageGPT with a language head,
and what transformers computes with it.

    make_causal.py

8 x 8 pixels of 16 colors, two layers; weights random, drawn wide enough that
the likeliest colors differ from pixel to pixel. Beside the checkpoint,
expected.json has images with the negative log-likelihood of each token, and
primers with their greedy continuation and the log-probability of each token.
"""

import json
import pathlib

import numpy
import torch
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

FOLDER = pathlib.Path(__file__).parent / "models/micro-causal"
SIDE, COLORS = 8, 16
POSITIONS = SIDE * SIDE


def main():
    torch.manual_seed(6)
    config = ImageGPTConfig(
        vocab_size=COLORS + 1, n_positions=POSITIONS, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4
    )
    model = ImageGPTForCausalImageModeling(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "wpe" in name or "wte" in name:
                parameter.normal_(0, 1)
    model.save_pretrained(FOLDER)
    random = numpy.random.default_rng(6)
    settings = {"do_resize": True, "do_normalize": True, "resample": 2, "size": SIDE}
    settings["clusters"] = random.uniform(-1, 1, (COLORS, 3)).astype("float32").tolist()
    (FOLDER / "preprocessor_config.json").write_text(json.dumps(settings))
    (FOLDER / "generation_config.json").unlink(missing_ok=True)
    expected = {"images": [], "primers": []}
    with torch.no_grad():
        for _ in range(3):
            image = torch.from_numpy(random.integers(0, COLORS, POSITIONS))
            context = torch.cat([torch.tensor([COLORS]), image[:-1]])
            logits = model(input_ids=context[None]).logits[0].double()
            nll = -logits.log_softmax(-1).gather(1, image[:, None])[:, 0]
            expected["images"].append({"tokens": image.tolist(), "nll": nll.tolist()})
        for length in [0, 1, 7, 32, 63]:
            primer = random.integers(0, COLORS, length)
            context = torch.tensor([[COLORS, *primer.tolist()]])
            tokens = model.generate(input_ids=context, max_length=POSITIONS + 1, do_sample=False)[0, 1:]
            fed = torch.cat([torch.tensor([COLORS]), tokens[:-1]])
            logits = model(input_ids=fed[None]).logits[0].double()
            chosen = logits.log_softmax(-1).gather(1, tokens[:, None])[length:, 0]
            expected["primers"].append(
                {"primer": primer.tolist(), "tokens": tokens.tolist(), "log_probs": chosen.tolist()}
            )
    (FOLDER / "expected.json").write_text(json.dumps(expected))
    for primer in expected["primers"]:
        print(primer["tokens"])


if __name__ == "__main__":
    main()
