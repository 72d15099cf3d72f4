"""Results of calls, and how the contract's answers become them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy

from imagegpt.options import ALPHAS, CONTEXTS, FITS, NORMS, Alpha, Context, Fit, Norm, name_of
from imagegpt.v1 import imagegpt_pb2 as pb

if TYPE_CHECKING:
    import PIL.Image
    from numpy.typing import NDArray

__all__ = [
    "ClassScore",
    "Classification",
    "GeneratedImage",
    "Head",
    "Limits",
    "ModelInfo",
    "Score",
    "Task",
]

Task = Literal["embed", "classify", "score", "generate"]
Activation = Literal["softmax", "sigmoid"]

_TASKS: Mapping[int, Task] = {
    pb.TASK_EMBED: "embed",
    pb.TASK_CLASSIFY: "classify",
    pb.TASK_SCORE: "score",
    pb.TASK_GENERATE: "generate",
}
_ACTIVATIONS: Mapping[int, Activation] = {
    pb.ACTIVATION_SOFTMAX: "softmax",
    pb.ACTIVATION_SIGMOID: "sigmoid",
}
_ELEMENTS: Mapping[int, numpy.dtype[Any]] = {
    pb.DATA_TYPE_F32: numpy.dtype("<f4"),
    pb.DATA_TYPE_UNSPECIFIED: numpy.dtype("<f4"),
    pb.DATA_TYPE_F16: numpy.dtype("<f2"),
}


def array_of(tensor: pb.Tensor) -> NDArray[Any]:
    """Returns the elements of a tensor. The array is read-only: it is the
    response's own memory."""
    elements: NDArray[Any] = numpy.frombuffer(tensor.data, _ELEMENTS[tensor.dtype])
    return elements.reshape(tuple(tensor.shape))


@dataclass(frozen=True)
class ClassScore:
    """Score of one class."""

    #: Row of the classification head.
    index: int
    #: Name of the class.
    label: str
    #: Probability, 0 to 1.
    score: float


@dataclass(frozen=True)
class Classification:
    """Class scores of one image."""

    #: Best classes, best first. Empty if the model has no labels.
    classes: tuple[ClassScore, ...]
    #: Logits of all classes, float32 (classes,); set on request, and if the model
    #: has no labels.
    logits: NDArray[numpy.float32] | None

    @property
    def label(self) -> str:
        """Name of the best class; the empty string if the model has no labels."""
        return self.classes[0].label if self.classes else ""

    @staticmethod
    def of(message: pb.Classification) -> Classification:
        """Converts the contract's message."""
        classes = (ClassScore(c.index, c.label, c.score) for c in message.classes)
        logits = array_of(message.logits) if message.HasField("logits") else None
        return Classification(tuple(classes), logits)


@dataclass(frozen=True)
class Score:
    """Negative log-likelihood of one image's tokens under the model, as in
    pre-training."""

    #: Sum over all tokens, in nats.
    nats: float
    #: Mean over all tokens, in nats.
    nats_per_token: float
    #: Mean over all tokens, in bits.
    bits_per_token: float
    #: Part of each pixel in the sum, in nats, float32 (side, side); set on
    #: request.
    map: NDArray[numpy.float32] | None
    #: Bits per token of a PNG file of the tokens, at the best compression; set on
    #: request.
    complexity_bits_per_token: float | None

    @staticmethod
    def of(message: pb.Score) -> Score:
        """Converts the contract's message."""
        has_complexity = message.HasField("complexity_bits_per_token")
        return Score(
            nats=message.nats,
            nats_per_token=message.nats_per_token,
            bits_per_token=message.bits_per_token,
            map=array_of(message.map) if message.HasField("map") else None,
            complexity_bits_per_token=message.complexity_bits_per_token if has_complexity else None,
        )


@dataclass(frozen=True)
class GeneratedImage:
    """Image that the model has generated or completed."""

    #: Number of the sample within its call, from 0.
    sample: int
    #: Seed of the call's random draws: on a CPU, the same call with this seed
    #: gives the same tokens.
    seed: int
    #: Tokens in raster order, uint16 (positions,), including the given ones.
    tokens: NDArray[numpy.uint16]
    #: PNG file with ``side * scale`` pixels per side.
    png: bytes
    #: ln p of each drawn color under the model itself, float32 (drawn pixels,) in
    #: raster order; set on request.
    log_probs: NDArray[numpy.float32] | None

    @property
    def image(self) -> PIL.Image.Image:
        """The picture, of mode RGB."""
        import io

        import PIL.Image

        return PIL.Image.open(io.BytesIO(self.png)).convert("RGB")

    @staticmethod
    def of(
        sample: int, seed: int, message: pb.GeneratedImage, has_log_probs: bool
    ) -> GeneratedImage:
        """Converts the contract's message."""
        log_probs = numpy.array(message.log_probs, numpy.float32) if has_log_probs else None
        return GeneratedImage(
            sample=sample,
            seed=seed,
            tokens=numpy.array(message.tokens.ids, numpy.uint16),
            png=message.png,
            log_probs=log_probs,
        )


@dataclass(frozen=True)
class Head:
    """Linear classifier that a worker has loaded."""

    name: str
    labels: tuple[str, ...]
    activation: Activation | None
    layer: int
    norm: Norm | None
    context: Context | None
    #: Fit of the images that the head was trained on; ``None`` if its file does
    #: not say.
    fit: Fit | None
    #: Alpha of the images that the head was trained on; ``None`` if its file does
    #: not say.
    alpha: Alpha | None
    weights_digest: str
    digest: str


@dataclass(frozen=True)
class Limits:
    """Limits on calls; each is a flag of the worker."""

    images_per_call_max: int
    request_bytes_max: int
    response_bytes_max: int
    image_pixels_max: int
    image_bytes_max: int
    images_in_flight_max: int
    batch_size_max: int
    stream_window_max: int
    generate_slots: int
    samples_per_call_max: int


@dataclass(frozen=True)
class ModelInfo:
    """Model that a worker serves."""

    name: str
    #: ``"sha256:…"`` over the graphs and configuration: models with equal digests
    #: give comparable vectors.
    digest: str
    #: ``"sha256:…"`` over the weights of which the graphs were made, equal in
    #: every precision.
    weights_digest: str
    tasks: frozenset[Task]
    #: Number of transformer blocks.
    layers: int
    layers_served: tuple[int, ...]
    layer_default: int
    #: Number of elements of a pooled vector.
    dimension: int
    #: Number of tokens per image: ``side * side``.
    positions: int
    side: int
    #: Colors of the tokens, uint8 (colors, 3): red, green, blue.
    palette: NDArray[numpy.uint8]
    labels: tuple[str, ...]
    activation: Activation | None
    heads: tuple[Head, ...]
    #: Name of the head that classifies if a call names none; empty for the
    #: checkpoint's own head.
    head_default: str
    execution_provider: str
    #: ``"fp32"``, ``"fp16"``, ``"bf16"`` or ``"int8"``; empty if unknown.
    precision: str
    onnxruntime_version: str
    worker_version: str
    limits: Limits
    #: Warning of the model's publisher; usually empty.
    notice: str

    def head(self, name: str) -> Head:
        """Returns the head of this name.

        Raises:
            KeyError: There is no such head.
        """
        for head in self.heads:
            if head.name == name:
                return head
        raise KeyError(name)

    @staticmethod
    def of(message: pb.GetModelResponse) -> ModelInfo:
        """Converts the contract's message."""
        limits = message.limits
        fields = Limits.__dataclass_fields__
        palette = numpy.frombuffer(message.palette_rgb8, numpy.uint8).reshape(-1, 3)
        return ModelInfo(
            name=message.name,
            digest=message.digest,
            weights_digest=message.weights_digest,
            tasks=frozenset(_TASKS[task] for task in message.tasks if task in _TASKS),
            layers=message.layers,
            layers_served=tuple(message.layers_served),
            layer_default=message.layer_default,
            dimension=message.dimension,
            positions=message.positions,
            side=message.side,
            palette=palette,
            labels=tuple(message.labels),
            activation=_ACTIVATIONS.get(message.activation),
            heads=tuple(_head(head) for head in message.heads),
            head_default=message.head_default,
            execution_provider=message.execution_provider,
            precision=message.precision,
            onnxruntime_version=message.onnxruntime_version,
            worker_version=message.worker_version,
            limits=Limits(**{name: getattr(limits, name) for name in fields}),
            notice=message.notice,
        )


def _head(message: pb.Head) -> Head:
    return Head(
        name=message.name,
        labels=tuple(message.labels),
        activation=_ACTIVATIONS.get(message.activation),
        layer=message.layer,
        norm=cast("Norm | None", name_of(message.norm, NORMS)),
        context=cast("Context | None", name_of(message.context, CONTEXTS)),
        fit=cast("Fit | None", name_of(message.fit, FITS)),
        alpha=cast("Alpha | None", name_of(message.alpha, ALPHAS)),
        weights_digest=message.weights_digest,
        digest=message.digest,
    )
