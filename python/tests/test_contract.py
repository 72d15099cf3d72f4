"""The contract and this package have the same options, codes and fields."""

from __future__ import annotations

import dataclasses

import grpc
import pytest

from imagegpt import Client, ClosedError, Limits, WorkerError
from imagegpt import errors as errors_module
from imagegpt.options import ALPHAS, CONTEXTS, DTYPES, FITS, NORMS, POOLINGS
from imagegpt.results import _ACTIVATIONS, _TASKS
from imagegpt.v1 import imagegpt_pb2 as pb


@pytest.mark.parametrize(
    ("enum", "names"),
    [
        (pb.Fit, FITS),
        (pb.Alpha, ALPHAS),
        (pb.Context, CONTEXTS),
        (pb.Pooling, POOLINGS),
        (pb.Norm, NORMS),
        (pb.DataType, DTYPES),
        (pb.Task, {name: value for value, name in _TASKS.items()}),
        (pb.Activation, {name: value for value, name in _ACTIVATIONS.items()}),
    ],
)
def test_every_value_of_the_contract_has_its_name(enum: object, names: dict[str, int]) -> None:
    values = dict(enum.items())  # type: ignore[attr-defined]
    zero = next(name for name, value in values.items() if value == 0)
    prefix = zero.removesuffix("UNSPECIFIED")
    wanted = {
        name.removeprefix(prefix).lower().replace("_", "-"): value
        for name, value in values.items()
        if value != 0
    }
    assert wanted == dict(names)


def test_limits_are_those_of_the_contract() -> None:
    fields = {field.name for field in dataclasses.fields(Limits)}
    assert fields == {field.name for field in pb.Limits.DESCRIPTOR.fields}


def test_every_code_has_an_error() -> None:
    for code in grpc.StatusCode:
        assert issubclass(errors_module.worker_error_class(code.name), WorkerError)
    assert errors_module.worker_error_class("UNAVAILABLE") is not WorkerError


def test_every_method_of_the_contract_has_one_of_the_client() -> None:
    service = pb.DESCRIPTOR.services_by_name["ImageGptService"]
    names = {
        "Embed": "embed",
        "EmbedStream": "embed_stream",
        "Classify": "classify",
        "Score": "score",
        "Generate": "generate",
        "Tokenize": "tokenize",
        "GetModel": "model",
    }
    assert {method.name for method in service.methods} == set(names)
    for name in names.values():
        assert callable(getattr(Client, name))


def test_every_error_is_public() -> None:
    import imagegpt

    assert ClosedError.__name__ in errors_module.__all__
    for name in errors_module.__all__:
        assert name in imagegpt.__all__
        assert getattr(imagegpt, name) is getattr(errors_module, name)
