"""What all clients do, within the event loop that they share."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import grpc
import grpc.aio
import numpy

from imagegpt.calls import Connections, Failure, code_name
from imagegpt.endpoints import ConnectOptions
from imagegpt.errors import (
    ClosedError,
    ImageError,
    InvalidImageError,
    InvalidRequestError,
    ModelMismatchError,
    WorkerError,
    image_error,
)
from imagegpt.images import ImageInput, to_message
from imagegpt.ledger import Ledger
from imagegpt.loop import GrpcLoop
from imagegpt.options import (
    Alpha,
    Context,
    Dtype,
    EmbedOptions,
    Fit,
    Layers,
    Norm,
    Pooling,
    Priority,
    preprocess,
    whole_number,
)
from imagegpt.results import Classification, GeneratedImage, ModelInfo, Score, array_of
from imagegpt.stream import EmbedStream, StreamOptions, Task, check_stream_options
from imagegpt.v1 import imagegpt_pb2 as pb

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ClientBase", "ClientCore", "OnError"]

OnError = Literal["raise", "return"]

# Requests of one call that are with workers at the same time: while one runs, the
# next is on its way.
_REQUESTS = 2
# Part of a request's largest size that its images may take; the rest is for the
# encoding of the message.
_FILL = 0.95

# Longest timeout in seconds that is passed on: 30 years. gRPC's clock overflows at
# longer ones, which would then be over at once.
_TIMEOUT_MAX = 1e9
# Reasons of a call that fails because of its only image.
_OF_IMAGES = frozenset({"IMAGE_INVALID", "IMAGE_MISSING"})

_T = TypeVar("_T")


def default_endpoints() -> str:
    """Returns the endpoint of a client that is given none: ``IMAGEGPT_ENDPOINT``, or
    a worker on this machine at its usual port."""
    return os.environ.get("IMAGEGPT_ENDPOINT", "http://127.0.0.1:50051")


def check_on_error(on_error: str) -> None:
    """Checks an argument ``on_error``.

    Raises:
        ValueError: The argument has another value.
    """
    if on_error not in ("raise", "return"):
        raise ValueError(f"on_error={on_error!r} is neither 'raise' nor 'return'")


def check_images(images: Iterable[ImageInput]) -> list[ImageInput]:
    """Returns the images as a list.

    Raises:
        TypeError: The argument is a single image, or no collection.
    """
    is_single = isinstance(images, (str, bytes, bytearray, memoryview, os.PathLike, pb.Image))
    shape = getattr(images, "shape", None)
    if shape is not None and len(shape) == 3 and 3 in (shape[0], shape[2]):
        is_single = True
    if isinstance(images, dict) or is_single or not hasattr(images, "__iter__"):
        kind = type(images).__name__
        raise TypeError(f"images is a single {kind}; give a list of images, [image]")
    return list(images)


def check_stream_source(images: Iterable[Any]) -> None:
    """Checks that the images of a stream are several.

    Raises:
        TypeError: The argument is a single image, a mapping, or no iterable.
    """
    if isinstance(images, (str, bytes, bytearray, memoryview, os.PathLike, Mapping)):
        kind = type(images).__name__
        raise TypeError(f"images is a {kind}; give an iterable of images or of pairs (id, image)")
    if not hasattr(images, "__iter__"):
        raise TypeError(f"images is a {type(images).__name__}, which is no iterable")


def checked_timeout(name: str, value: float | None) -> float | None:
    """Returns a time in seconds; one that is longer than gRPC's clock counts as none.

    Raises:
        TypeError, ValueError: The value is no time above 0.
    """
    if value is None:
        return None
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}={value!r} is no time in seconds")
    seconds = float(value)
    if not seconds > 0:
        raise ValueError(f"{name}={value} is no time in seconds above 0")
    return None if seconds > _TIMEOUT_MAX else seconds


def raise_first(outcomes: Sequence[_T | ImageError]) -> list[_T]:
    """Returns the outcomes.

    Raises:
        ImageError: The first error among them.
    """
    plain: list[_T] = []
    for outcome in outcomes:
        if isinstance(outcome, ImageError):
            raise outcome
        plain.append(outcome)
    return plain


class ClientCore:
    """Calls to one or more workers that serve the same model.

    :class:`imagegpt.Client` and :class:`imagegpt.AsyncClient` are faces of this class,
    and describe its methods. All its coroutines run in the one loop of the process
    (:mod:`imagegpt.loop`), since grpc.aio disturbs programs with several.
    """

    def __init__(
        self,
        *,
        endpoints: str | Sequence[str] | None,
        timeout: float | None,
        digest: str | None,
        **connect: Any,
    ) -> None:
        self._connect = ConnectOptions.checked(
            default_endpoints() if endpoints is None else endpoints, **connect
        )
        self._timeout = checked_timeout("timeout", timeout)
        self._digest = digest
        self._connections = Connections(self._connect)
        self._model: ModelInfo | None = None

    def watch(self, has_ended: Callable[[], WorkerError | None]) -> None:
        """Sets who knows why no worker will ever answer again; calls that find none
        ask before each new try."""
        self._connections.has_ended = has_ended

    async def close(self) -> None:
        """Closes the connections; calls in progress fail with
        :class:`~imagegpt.ClosedError`."""
        await self._connections.close()

    async def model(self, *, timeout: float | None = None) -> ModelInfo:
        """Returns the model that the workers serve."""
        message = await self._connections.call(
            lambda stub, left, metadata: stub.GetModel(
                pb.GetModelRequest(), timeout=left, metadata=metadata
            ),
            items=(),
            timeout=self._wait(timeout),
        )
        self._check_digest(message.digest, self._digest, ())
        self._model = ModelInfo.of(message)
        return self._model

    def _wait(self, timeout: float | None) -> float | None:
        """Returns the timeout of a call, or else the client's."""
        return self._timeout if timeout is None else checked_timeout("timeout", timeout)

    async def _known_model(self, timeout: float | None) -> ModelInfo:
        """Returns the model as a call found it before, for the limits."""
        return self._model if self._model is not None else await self.model(timeout=timeout)

    def _check_digest(self, digest: str, wanted: str | None, items: Sequence[Hashable]) -> None:
        if wanted is None or digest == wanted:
            return
        self._model = None
        text = f"the worker serves another model ({digest}) than {wanted}"
        raise ModelMismatchError("FAILED_PRECONDITION", text, items=items)

    async def embed(
        self,
        images: Iterable[ImageInput],
        *,
        layers: Layers = None,
        pooling: Pooling = "mean",
        fit: Fit | None = None,
        alpha: Alpha | None = None,
        context: Context = "raw",
        norm: Norm = "pre-attn-rms",
        normalize: bool = False,
        dtype: Dtype = "f32",
        priority: Priority | None = None,
        timeout: float | None = None,
        on_error: OnError = "raise",
    ) -> NDArray[Any] | list[NDArray[Any] | ImageError]:
        """Returns feature vectors; see :meth:`imagegpt.Client.embed`."""
        options = EmbedOptions.checked(layers, pooling, fit, alpha, context, norm, normalize, dtype)
        given = self._checked(images, on_error)
        model = await self._known_model(timeout)
        template = options.request(model)
        n_vectors = model.positions if pooling == "none" else max(1, len(template.layers))
        outcomes = await self._in_requests(
            given,
            lambda stub: stub.Embed,
            lambda images: _with_images(template, images),
            lambda result: as_given(array_of(result.embedding), options),
            result_bytes=n_vectors * model.dimension * (2 if dtype == "f16" else 4),
            timeout=timeout,
            priority=priority,
        )
        if on_error == "return":
            return outcomes
        vectors = raise_first(outcomes)
        if vectors:
            return numpy.stack(vectors)
        axes: list[int] = [0]
        if options.has_layer_axis:
            axes.append(len(template.layers))
        if pooling == "none":
            axes.append(model.positions)
        element = numpy.float16 if dtype == "f16" else numpy.float32
        return numpy.empty((*axes, model.dimension), element)

    async def classify(
        self,
        images: Iterable[ImageInput],
        *,
        top_k: int = 5,
        logits: bool = False,
        head: str = "",
        fit: Fit | None = None,
        alpha: Alpha | None = None,
        priority: Priority | None = None,
        timeout: float | None = None,
        on_error: OnError = "raise",
    ) -> list[Classification] | list[Classification | ImageError]:
        """Returns class scores; see :meth:`imagegpt.Client.classify`."""
        template = pb.ClassifyRequest(
            preprocess=preprocess(fit, alpha),
            top_k=whole_number("top_k", top_k, 1),
            logits=logits,
            head=head,
        )
        outcomes = await self._in_requests(
            self._checked(images, on_error),
            lambda stub: stub.Classify,
            lambda images: _with_images(template, images),
            lambda result: Classification.of(result.classification),
            timeout=timeout,
            priority=priority,
        )
        return outcomes if on_error == "return" else raise_first(outcomes)

    async def score(
        self,
        images: Iterable[ImageInput],
        *,
        map: bool = False,
        complexity: bool = False,
        fit: Fit | None = None,
        alpha: Alpha | None = None,
        priority: Priority | None = None,
        timeout: float | None = None,
        on_error: OnError = "raise",
    ) -> list[Score] | list[Score | ImageError]:
        """Returns likelihoods; see :meth:`imagegpt.Client.score`."""
        template = pb.ScoreRequest(
            preprocess=preprocess(fit, alpha), map=map, complexity=complexity
        )
        given = self._checked(images, on_error)
        model = await self._known_model(timeout)
        outcomes = await self._in_requests(
            given,
            lambda stub: stub.Score,
            lambda images: _with_images(template, images),
            lambda result: Score.of(result.score),
            result_bytes=model.positions * 4 if map else 0,
            timeout=timeout,
            priority=priority,
        )
        return outcomes if on_error == "return" else raise_first(outcomes)

    async def tokenize(
        self,
        images: Iterable[ImageInput],
        *,
        fit: Fit | None = None,
        alpha: Alpha | None = None,
        priority: Priority | None = None,
        timeout: float | None = None,
        on_error: OnError = "raise",
    ) -> NDArray[numpy.uint16] | list[NDArray[numpy.uint16] | ImageError]:
        """Returns color tokens; see :meth:`imagegpt.Client.tokenize`."""
        template = pb.TokenizeRequest(preprocess=preprocess(fit, alpha))
        given = self._checked(images, on_error)
        outcomes = await self._in_requests(
            given,
            lambda stub: stub.Tokenize,
            lambda images: _with_images(template, images),
            lambda result: numpy.array(result.tokens.ids, numpy.uint16),
            timeout=timeout,
            priority=priority,
        )
        if on_error == "return":
            return outcomes
        tokens = raise_first(outcomes)
        if tokens:
            return numpy.stack(tokens)
        return numpy.empty((0, (await self._known_model(timeout)).positions), numpy.uint16)

    def stream_options(
        self,
        *,
        layers: Layers,
        pooling: Pooling,
        fit: Fit | None,
        alpha: Alpha | None,
        context: Context,
        norm: Norm,
        normalize: bool,
        dtype: Dtype,
        window: int,
        item_timeout: float,
        give_up_after: float,
        priority: Priority | None,
        on_error: str,
    ) -> tuple[EmbedOptions, StreamOptions]:
        """Checks the options of a stream.

        Raises:
            TypeError, ValueError: An option has a value that no worker takes.
        """
        check_on_error(on_error)
        check_stream_options(window, item_timeout, give_up_after, priority)
        embed = EmbedOptions.checked(layers, pooling, fit, alpha, context, norm, normalize, dtype)
        return embed, StreamOptions(
            window=window,
            item_timeout=item_timeout,
            give_up_after=give_up_after,
            priority=priority,
            digest=self._digest,
            is_known=self._model is not None,
        )

    def stream(
        self,
        embed: EmbedOptions,
        options: StreamOptions,
        answers: Callable[[tuple[Task, Any]], None],
        failed: Callable[[BaseException], None],
        opened: Callable[[], None],
    ) -> EmbedStream:
        """Returns a stream, to be started in the loop."""
        return EmbedStream(self._connections, embed, options, answers, failed, opened)

    def _checked(self, images: Iterable[ImageInput], on_error: str) -> list[ImageInput]:
        self._connections.check_open()
        check_on_error(on_error)
        return check_images(images)

    async def _in_requests(
        self,
        images: list[ImageInput],
        method: Callable[[Any], Callable[..., Awaitable[Any]]],
        request: Callable[[Sequence[pb.Image]], Any],
        value: Callable[[Any], _T],
        *,
        timeout: float | None,
        priority: Priority | None,
        result_bytes: int = 0,
    ) -> list[_T | ImageError]:
        """Sends images in requests within the worker's limits, and returns their
        outcomes in order."""
        outcomes: list[_T | ImageError | None] = [None] * len(images)
        if not images:
            return []
        limits = (await self._known_model(timeout)).limits
        per_call = max(1, limits.images_per_call_max)
        if result_bytes:
            per_call = max(1, min(per_call, limits.response_bytes_max // result_bytes))
        bytes_max = int(limits.request_bytes_max * _FILL)
        wanted = self._digest

        def missing() -> list[int]:
            return [index for index, outcome in enumerate(outcomes) if outcome is None]

        async def send(batch: list[tuple[int, pb.Image]]) -> None:
            nonlocal wanted
            message = request([image for _, image in batch])
            try:
                response = await self._connections.call(
                    lambda stub, left, metadata: method(stub)(
                        message, timeout=left, metadata=metadata
                    ),
                    items=[index for index, _ in batch],
                    timeout=self._wait(timeout),
                    priority=priority,
                )
            except WorkerError as error:
                # The limits may be those of a worker that has been replaced.
                self._model = None
                error.items = missing()
                raise
            if wanted is None:
                wanted = response.model_digest
            self._check_digest(response.model_digest, wanted, missing())
            if len(response.results) != len(batch):
                text = f"the worker sent {len(response.results)} results for {len(batch)} images"
                raise WorkerError("INTERNAL", text, items=missing())
            for (index, _), result in zip(batch, response.results, strict=True):
                outcomes[index] = _outcome(index, result, value)

        running: set[asyncio.Task[None]] = set()
        begun: list[asyncio.Task[None]] = []
        try:
            for start in range(0, len(images), per_call):
                group = range(start, min(start + per_call, len(images)))
                converted = await asyncio.to_thread(
                    _all_converted,
                    [images[index] for index in group],
                    start,
                    limits.image_bytes_max,
                    bytes_max,
                )
                for index, image in zip(group, converted, strict=True):
                    if isinstance(image, ImageError):
                        outcomes[index] = image
                sound = [
                    (index, image)
                    for index, image in zip(group, converted, strict=True)
                    if not isinstance(image, ImageError)
                ]
                for batch in _by_bytes(sound, bytes_max):
                    if len(running) >= _REQUESTS:
                        done, running = await asyncio.wait(
                            running, return_when=asyncio.FIRST_COMPLETED
                        )
                        for task in done:
                            task.result()
                    begun.append(asyncio.get_running_loop().create_task(send(batch)))
                    running.add(begun[-1])
            while running:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            for task in running:
                task.cancel()
            # Also takes the errors of requests beside the one that failed first.
            await asyncio.gather(*begun, return_exceptions=True)
        return [outcome for outcome in outcomes if outcome is not None]

    async def generate(
        self,
        *,
        samples: int = 1,
        prefix: Any = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        scale: int = 1,
        log_probs: bool = False,
        priority: Priority | None = None,
        timeout: float | None = None,
        on_error: OnError = "raise",
    ) -> list[GeneratedImage] | list[GeneratedImage | ImageError]:
        """Generates images; see :meth:`imagegpt.Client.generate`."""
        request = _generate_request(samples, temperature, top_k, top_p, seed, scale, log_probs)
        if prefix is not None:
            tokens = numpy.asarray(prefix)
            if tokens.size == 0:
                tokens = tokens.astype(numpy.int64)
            message = to_message(tokens, "prefix", 0)
            if message.WhichOneof("source") != "tokens":
                raise InvalidImageError("prefix", "INVALID_ARGUMENT", "the prefix has no tokens")
            request.prefix.CopyFrom(message.tokens)
        return await self._generate(request, priority, timeout, on_error)

    async def complete(
        self,
        image: ImageInput,
        *,
        rows: int | None = None,
        mask: Any = None,
        samples: int = 1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        scale: int = 1,
        log_probs: bool = False,
        fit: Fit | None = None,
        alpha: Alpha | None = None,
        priority: Priority | None = None,
        timeout: float | None = None,
        on_error: OnError = "raise",
    ) -> list[GeneratedImage] | list[GeneratedImage | ImageError]:
        """Completes an image; see :meth:`imagegpt.Client.complete`."""
        if (rows is None) == (mask is None):
            raise ValueError("give either rows, kept from the top, or a mask of kept pixels")
        request = _generate_request(samples, temperature, top_k, top_p, seed, scale, log_probs)
        self._connections.check_open()
        limits = (await self._known_model(timeout)).limits
        message = await asyncio.to_thread(to_message, image, 0, limits.image_bytes_max)
        primer = pb.ImagePrimer(image=message, preprocess=preprocess(fit, alpha))
        if mask is None:
            primer.rows = whole_number("rows", rows, 0)
        else:
            kept = numpy.asarray(mask)
            if kept.dtype.kind not in "biu":
                raise TypeError(f"the mask has elements of {kept.dtype}, not booleans")
            primer.mask = kept.astype(bool).astype(numpy.uint8).tobytes()
        request.image.CopyFrom(primer)
        try:
            return await self._generate(request, priority, timeout, on_error)
        except InvalidRequestError as error:
            if error.reason not in _OF_IMAGES:
                raise
            raise InvalidImageError(0, error.code, error.message) from error

    async def _generate(
        self,
        request: pb.GenerateRequest,
        priority: Priority | None,
        timeout: float | None,
        on_error: str,
    ) -> list[Any]:
        check_on_error(on_error)
        outcomes: dict[int, GeneratedImage | ImageError] = {}
        numbers = range(request.samples)
        digests: list[str] = []

        async def attempt(stub: Any, left: float | None, metadata: Any) -> Failure | None:
            call = stub.Generate(request, timeout=left, metadata=metadata)
            seed = 0
            try:
                async for response in call:
                    kind = response.WhichOneof("message")
                    if kind == "started":
                        seed = response.started.seed
                        digests.append(response.started.model_digest)
                        if self._digest not in (None, digests[-1]):
                            return None
                    elif kind == "result":
                        result = response.result
                        value = functools.partial(_generated, seed, request.log_probs)
                        outcomes[result.sample] = _outcome(result.sample, result, value)
            except grpc.aio.AioRpcError as error:
                if not outcomes:
                    raise
                # Images that are done would be lost by another try.
                return Failure.of(error)
            finally:
                call.cancel()
            return None

        failure = await self._connections.call(
            attempt,
            items=numbers,
            timeout=self._wait(timeout),
            priority=priority,
        )
        for digest in digests[-1:]:
            self._check_digest(digest, self._digest, numbers)
        missing = [number for number in numbers if number not in outcomes]
        if missing:
            failure = failure or Failure("INTERNAL", "the worker sent no outcome")
            raise failure.error(missing)
        ordered = [outcomes[number] for number in numbers]
        return ordered if on_error == "return" else raise_first(ordered)


class ClientBase:
    """What :class:`imagegpt.Client` and :class:`imagegpt.AsyncClient` have in common:
    their arguments, and a core for each process that they are used in."""

    def __init__(
        self,
        endpoints: str | Sequence[str] | None = None,
        *,
        timeout: float | None = 300.0,
        digest: str | None = None,
        tls: bool | None = None,
        tls_ca: str | os.PathLike[str] | None = None,
        tls_client_cert: str | os.PathLike[str] | None = None,
        tls_client_key: str | os.PathLike[str] | None = None,
        token: str | None = None,
        token_file: str | os.PathLike[str] | None = None,
    ) -> None:
        self._arguments: dict[str, Any] = {
            "endpoints": endpoints,
            "timeout": timeout,
            "digest": digest,
            "tls": tls,
            "tls_ca": tls_ca,
            "tls_client_cert": tls_client_cert,
            "tls_client_key": tls_client_key,
            "token": token,
            "token_file": token_file,
        }
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._inner = ClientCore(**self._arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_unpickled, (type(self), self._arguments, self._closed))

    def _core(self) -> ClientCore:
        """Returns this process's core.

        Raises:
            ClosedError: The client is closed.
            ForkError: The process was forked while its parent made calls.
        """
        if self._closed:
            raise ClosedError("the client is closed")
        # Before the parent's connections are dropped, which a process that cannot
        # use gRPC does not survive.
        GrpcLoop.get()
        with self._lock:
            if self._process != os.getpid():
                self._inner, self._process = ClientCore(**self._arguments), os.getpid()
            return self._inner

    def _check_usable(self, ledger: Ledger) -> None:
        """Raises the error of a client that can give no further answers to a
        stream."""
        if self._closed:
            raise ClosedError("the client is closed")

    def _closing(self) -> ClientCore | None:
        """Marks the client as closed; returns the core that is left to be closed."""
        if self._closed:
            return None
        self._closed = True
        return self._inner if self._process == os.getpid() else None


def _unpickled(kind: type[ClientBase], arguments: dict[str, Any], is_closed: bool) -> ClientBase:
    client = kind(**arguments)
    client._closed = is_closed
    return client


def with_items(error: BaseException, ledger: Ledger) -> BaseException:
    """Adds the ids of the images without an outcome to an error."""
    if isinstance(error, WorkerError):
        error.items = ledger.unanswered()
    return error


def accept(ledger: Ledger, item: Any, stream: EmbedStream) -> Task | None:
    """Takes an item of a stream in: an image, whose id is its number, or a pair of
    an id and an image. Returns ``None`` if the image cannot be sent; its error is
    in the ledger then."""
    has_id = isinstance(item, tuple) and len(item) == 2
    number = ledger.accept(item[0] if has_id else ledger.number)
    id, image = item if has_id else (number, item)
    message = _converted(image, id, stream.image_bytes_max, stream.message_bytes_max)
    if isinstance(message, ImageError):
        ledger.settle(number, message)
        return None
    task = Task.of(number, id, message)
    ledger.weigh(number, len(task.message))
    return task


def as_given(array: NDArray[Any], options: EmbedOptions) -> NDArray[Any]:
    """Returns a vector with an axis of layers if the caller gave a list of them; the
    contract leaves the axis out for a list of one."""
    layers = options.layers
    is_one = options.has_layer_axis and layers is not None and len(layers) == 1
    return array[numpy.newaxis] if is_one else array


def _converted(
    image: ImageInput, id: Hashable, bytes_max: int, message_max: int
) -> pb.Image | ImageError:
    try:
        return to_message(image, id, bytes_max, message_max)
    except InvalidImageError as error:
        return error


def _all_converted(
    images: list[ImageInput], start: int, bytes_max: int, message_max: int
) -> list[pb.Image | ImageError]:
    return [
        _converted(image, start + offset, bytes_max, message_max)
        for offset, image in enumerate(images)
    ]


def _by_bytes(
    images: list[tuple[int, pb.Image]], bytes_max: int
) -> Iterable[list[tuple[int, pb.Image]]]:
    """Divides images into requests of at most this size; an image that is larger is
    alone, and the worker says so."""
    batch: list[tuple[int, pb.Image]] = []
    total = 0
    for index, image in images:
        size = image.ByteSize()
        if batch and total + size > bytes_max:
            yield batch
            batch, total = [], 0
        batch.append((index, image))
        total += size
    if batch:
        yield batch


def _with_images(template: Any, images: Sequence[pb.Image]) -> Any:
    request = type(template)()
    request.CopyFrom(template)
    request.images.extend(images)
    return request


def _outcome(id: Hashable, result: Any, value: Callable[[Any], _T]) -> _T | ImageError:
    kind = result.WhichOneof("outcome")
    if kind is None:
        return image_error(id, "INTERNAL", "the worker sent no outcome")
    if kind != "error":
        return value(result)
    return image_error(id, code_name(result.error.code), result.error.message)


def _generated(seed: int, has_log_probs: bool, result: pb.GenerateResult) -> GeneratedImage:
    return GeneratedImage.of(result.sample, seed, result.image, has_log_probs)


def _generate_request(
    samples: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
    scale: int,
    log_probs: bool,
) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        samples=whole_number("samples", samples, 1),
        temperature=temperature,
        top_k=whole_number("top_k", top_k, 0),
        top_p=top_p,
        seed=None if seed is None else whole_number("seed", seed, 0, (1 << 64) - 1),
        scale=whole_number("scale", scale, 1),
        log_probs=log_probs,
        no_rows=True,
    )
