"""A user's program, which mypy checks strictly."""

import asyncio
from pathlib import Path

import numpy
import PIL.Image

from imagegpt import AsyncClient, Client, ImageError, LocalWorker


def main() -> None:
    with LocalWorker("models/emoji", feature_layer=8) as worker:
        vectors = worker.embed([Path("a.png"), "b.png", b"bytes", numpy.zeros((4, 4, 3), "u1")])
        print(vectors.shape, vectors.mean())
        for outcome in worker.embed(["a.png"], on_error="return"):
            if isinstance(outcome, ImageError):
                print(outcome.id, outcome.code, outcome.message)
            else:
                print(outcome.shape)
    client = Client(["one:50051", "two:50051"], token_file="token")
    for id, vector in client.embed_stream((("key", PIL.Image.new("RGB", (4, 4))),), ordered=True):
        print(id, vector if isinstance(vector, ImageError) else vector[0])
    label: str = client.classify(["a.png"])[0].label
    bits: float = client.score(["a.png"])[0].bits_per_token
    picture: PIL.Image.Image = client.complete("a.png", rows=16, seed=1)[0].image
    print(label, bits, picture.size, client.model().layers_served)


async def main_async() -> None:
    async with AsyncClient("one:50051") as client:
        vectors = await client.embed(["a.png"], layers=[1, 2])
        print(vectors.shape)
        async for id, outcome in client.embed_stream(["a.png"]):
            print(id, outcome)


if __name__ == "__main__":
    main()
    asyncio.run(main_async())
