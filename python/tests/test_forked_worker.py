"""A local worker in a fork of the program that started it."""

import os
from pathlib import Path

import pytest

from imagegpt import LocalWorker

ROOT = Path(__file__).parents[2]


@pytest.mark.slow  # gRPC hangs in a forked child now and then.
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_calls_its_parents_worker_and_leaves_it_running() -> None:
    picture = ROOT / "models/pictures/flags/rainbow-flag.png"
    with LocalWorker(ROOT / "models/emoji", feature_layer=1) as worker:
        expected = worker.embed([picture])
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            # Nothing of pytest may run in the child.
            try:
                answer = worker.embed([picture]).tobytes()
            except BaseException as error:
                answer = repr(error).encode()
            os.write(writer, answer)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        assert answer == expected.tobytes()
        assert (worker.embed([picture]) == expected).all()
