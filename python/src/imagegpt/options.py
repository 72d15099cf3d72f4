"""Options of calls, by the names that the command line uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from imagegpt.v1 import imagegpt_pb2 as pb

__all__ = [
    "Alpha",
    "Context",
    "Dtype",
    "EmbedOptions",
    "Fit",
    "Layers",
    "Norm",
    "Pooling",
    "Priority",
]

Fit = Literal["squash", "center-crop"]
Alpha = Literal["drop", "white"]
Context = Literal["raw", "sos-shifted"]
Pooling = Literal["mean", "last", "none"]
Norm = Literal["pre-attn-rms", "none"]
Dtype = Literal["f32", "f16"]
Priority = Literal["interactive", "bulk"]
Layers = int | Sequence[int] | Literal["all"] | None

FITS: Mapping[str, pb.Fit] = {"squash": pb.FIT_SQUASH, "center-crop": pb.FIT_CENTER_CROP}
ALPHAS: Mapping[str, pb.Alpha] = {"drop": pb.ALPHA_DROP, "white": pb.ALPHA_WHITE}
CONTEXTS: Mapping[str, pb.Context] = {
    "raw": pb.CONTEXT_RAW,
    "sos-shifted": pb.CONTEXT_SOS_SHIFTED,
}
POOLINGS: Mapping[str, pb.Pooling] = {
    "mean": pb.POOLING_MEAN,
    "last": pb.POOLING_LAST,
    "none": pb.POOLING_NONE,
}
NORMS: Mapping[str, pb.Norm] = {"pre-attn-rms": pb.NORM_PRE_ATTN_RMS, "none": pb.NORM_NONE}
DTYPES: Mapping[str, pb.DataType] = {"f32": pb.DATA_TYPE_F32, "f16": pb.DATA_TYPE_F16}
PRIORITIES: Mapping[str, str] = {"interactive": "interactive", "bulk": "bulk"}

_V = TypeVar("_V")


def chosen(option: str, value: str, values: Mapping[str, _V]) -> _V:
    """Returns the contract's value of an option.

    Raises:
        ValueError: The option has no such value.
    """
    try:
        return values[value]
    except (KeyError, TypeError):
        known = ", ".join(repr(name) for name in values)
        raise ValueError(f"{option}={value!r} is none of {known}") from None


def name_of(value: _V, values: Mapping[str, _V]) -> str | None:
    """Returns the name of the contract's value; ``None`` for one without a name."""
    return next((name for name, known in values.items() if known == value), None)


def whole_number(option: str, value: object, minimum: int, maximum: int = (1 << 32) - 1) -> int:
    """Returns a whole number between two bounds; NumPy's integers count as such.

    Raises:
        TypeError: The value is no whole number.
        ValueError: The value is out of bounds.
    """
    import operator

    if isinstance(value, bool):
        raise TypeError(f"{option}={value!r} is no whole number")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{option}={value!r} is no whole number") from None
    if not minimum <= number <= maximum:
        raise ValueError(f"{option}={number} is not between {minimum} and {maximum}")
    return number


class ServedLayers(Protocol):
    """A model, as far as its layers: a message of the contract, or
    :class:`imagegpt.ModelInfo`."""

    @property
    def layers_served(self) -> Sequence[int]:
        """Layers that can be asked for, in ascending order."""

    @property
    def layer_default(self) -> int:
        """Layer of a request that names none."""


def together(model: ServedLayers) -> list[int]:
    """Returns the layers that the model computes in one run."""
    return [layer for layer in model.layers_served if layer <= model.layer_default]


@dataclass(frozen=True)
class EmbedOptions:
    """Options of Embed and EmbedStream, checked before anything is sent."""

    layers: tuple[int, ...] | Literal["all"] | None
    #: True if the vectors have an axis of layers.
    has_layer_axis: bool
    pooling: Pooling
    preprocess: pb.Preprocess
    context: Context
    norm: Norm
    normalize: bool
    dtype: Dtype

    @staticmethod
    def checked(
        layers: Layers,
        pooling: Pooling,
        fit: Fit | None,
        alpha: Alpha | None,
        context: Context,
        norm: Norm,
        normalize: bool,
        dtype: Dtype,
    ) -> EmbedOptions:
        """Checks the options.

        Raises:
            TypeError, ValueError: An option has a value that no worker takes.
        """
        chosen("pooling", pooling, POOLINGS)
        chosen("context", context, CONTEXTS)
        chosen("norm", norm, NORMS)
        chosen("dtype", dtype, DTYPES)
        wanted: tuple[int, ...] | Literal["all"] | None
        if layers is None or isinstance(layers, str):
            if layers not in (None, "all"):
                raise ValueError(f"layers={layers!r} is neither a number, numbers, nor 'all'")
            wanted, has_axis = ("all" if layers else None), layers is not None
        elif isinstance(layers, Sequence) or hasattr(layers, "__iter__"):
            wanted = tuple(whole_number("layers", layer, 0) for layer in layers)
            has_axis = True
            if not wanted:
                raise ValueError("layers=[] names no layer; leave it out for the default layer")
            if list(wanted) != sorted(set(wanted)):
                raise ValueError(f"layers={list(wanted)} are not in ascending order")
        else:
            wanted, has_axis = (whole_number("layers", layers, 0),), False
        return EmbedOptions(
            layers=wanted,
            has_layer_axis=has_axis,
            pooling=pooling,
            preprocess=preprocess(fit, alpha),
            context=context,
            norm=norm,
            normalize=bool(normalize),
            dtype=dtype,
        )

    def numbers(self, model: ServedLayers) -> list[int]:
        """Returns the layers as the contract has them; empty for the default. All
        layers are those up to the default one, which the model computes in one run;
        the last layer may come from another."""
        if self.layers == "all":
            return together(model)
        return list(self.layers or ())

    def request(self, model: ServedLayers) -> pb.EmbedRequest:
        """Returns a request of these options, without images."""
        return pb.EmbedRequest(
            preprocess=self.preprocess,
            context=CONTEXTS[self.context],
            pooling=POOLINGS[self.pooling],
            normalize=self.normalize,
            dtype=DTYPES[self.dtype],
            layers=self.numbers(model),
            norm=NORMS[self.norm],
        )

    def opening(self, model: ServedLayers, window: int) -> pb.EmbedStreamOptions:
        """Returns the opening of a stream of these options."""
        return pb.EmbedStreamOptions(
            preprocess=self.preprocess,
            context=CONTEXTS[self.context],
            pooling=POOLINGS[self.pooling],
            normalize=self.normalize,
            dtype=DTYPES[self.dtype],
            layers=self.numbers(model),
            norm=NORMS[self.norm],
            order=pb.ORDER_AS_DONE,
            window=window,
        )


def preprocess(fit: Fit | None, alpha: Alpha | None) -> pb.Preprocess:
    """Returns the options of preprocessing; ``None`` leaves the choice to the
    worker, and with a linear head to the head.

    Raises:
        ValueError: An option has no such value.
    """
    return pb.Preprocess(
        fit=pb.FIT_UNSPECIFIED if fit is None else chosen("fit", fit, FITS),
        alpha=pb.ALPHA_UNSPECIFIED if alpha is None else chosen("alpha", alpha, ALPHAS),
    )
