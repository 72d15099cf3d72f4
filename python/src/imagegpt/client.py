"""Client for programs without asyncio."""

from __future__ import annotations

import asyncio
import gc
import os
import queue
import threading
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import numpy

from imagegpt.aio import AsyncClient, OnError, accept, as_given, check_on_error, with_items
from imagegpt.calls import Connections
from imagegpt.errors import ClosedError, ForkError, ImageError
from imagegpt.images import ImageInput
from imagegpt.ledger import Ledger
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
)
from imagegpt.results import Classification, GeneratedImage, ModelInfo, Score
from imagegpt.stream import EmbedStream, StreamOptions, Task, check_stream_options

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Client"]

# Images that are handed to the event loop at the same time, since each handover
# wakes it.
_HANDOVER = 8

_T = TypeVar("_T")


class _Loop:
    """Event loop in a thread of its own, which all clients of a process share."""

    # Held while a call is handed over, and during a fork.
    _lock = threading.Lock()
    _current: _Loop | None = None

    def __init__(self) -> None:
        self.process = os.getpid()
        self.loop = asyncio.new_event_loop()
        # A daemon, so that a client that was not closed does not keep the program.
        thread = threading.Thread(target=self.loop.run_forever, name="imagegpt", daemon=True)
        thread.start()

    @classmethod
    def get(cls) -> _Loop:
        """Returns this process's loop.

        Raises:
            ForkError: The process was forked while its parent made calls.
        """
        if _Forks.is_broken:
            raise ForkError(
                "this process was forked while its parent had calls in progress, which gRPC does "
                "not survive; start processes by the method 'spawn' or 'forkserver', or fork "
                "before the first call"
            )
        with cls._lock:
            if cls._current is None:
                cls._current = _Loop()
            return cls._current

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Runs a coroutine in the loop, and waits for it."""
        with self._lock:
            future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result()
        except BaseException:
            # The caller was interrupted, or the coroutine failed.
            future.cancel()
            raise


# Longest time in seconds in which connections are closed before a fork.
_FORK_TIMEOUT = 5.0
# Collections of garbage before a fork; two were enough where one was not.
_COLLECTIONS = 4


def _polls() -> bool:
    """True if a thread of grpc.aio waits within gRPC, as one does while there are
    channels."""
    return any("_poll_wrapper" in thread.name for thread in threading.enumerate())


class _Forks:
    """gRPC works in a forked process only if no thread of the parent was within it
    at the time. So connections without calls are closed before a fork, and opened
    again when they are needed; a process that was forked during calls says so."""

    #: True in a process whose parent had calls in progress.
    is_broken = False
    _was_busy = False

    @classmethod
    def before(cls) -> None:
        """Closes the connections, and lets no call begin until the fork is done."""
        _Loop._lock.acquire()
        loop = _Loop._current
        opened = list(Connections.opened)
        cls._was_busy = any(connections.n_in_progress for connections in opened)
        if loop is None or loop.process != os.getpid() or cls._was_busy:
            # Without a loop, connections are those of asyncio programs.
            cls._was_busy = cls._was_busy or _polls()
            return
        try:
            asyncio.run_coroutine_threadsafe(cls._release(opened), loop.loop).result(_FORK_TIMEOUT)
        except (TimeoutError, RuntimeError):
            cls._was_busy = True
        del opened
        # What is left of the channels keeps a thread within gRPC. Tasks and calls that
        # refer to each other are freed by several collections; an exception that the
        # program keeps is not.
        for _ in range(_COLLECTIONS):
            if not _polls():
                return
            gc.collect()
        cls._was_busy = cls._was_busy or _polls()

    @staticmethod
    async def _release(opened: list[Connections]) -> None:
        for connections in opened:
            await connections.release()

    @staticmethod
    def after_in_parent() -> None:
        """Lets calls begin again."""
        _Loop._lock.release()

    @classmethod
    def after_in_child(cls) -> None:
        """Begins without the parent's loop, whose thread does not exist here."""
        cls.is_broken = cls.is_broken or cls._was_busy
        _Loop._lock, _Loop._current = threading.Lock(), None


os.register_at_fork(
    before=_Forks.before,
    after_in_parent=_Forks.after_in_parent,
    after_in_child=_Forks.after_in_child,
)


class Client:
    """Client of one or more workers that serve the same model.

    Connections are opened by the first call. A client may be used by several
    threads, and may be pickled: the copy opens connections of its own, as does a
    client in a forked process.

    Args:
        endpoints: ``"HOST:PORT"``, ``"http://HOST:PORT"``, ``"https://HOST:PORT"`` or
            ``"dns:///HOST:PORT"``, or several of them, also separated by commas. A
            name with several addresses stands for one worker per address. Default:
            the environment variable ``IMAGEGPT_ENDPOINT``, or else a worker at
            ``http://127.0.0.1:50051``.
        timeout: Longest time in seconds for each request to a worker, with the waits
            of its repetitions; ``None`` for no limit. A call with more images than
            a worker takes at once consists of several requests.
        digest: Digest that the workers' model must have (``model().digest``).
        tls: True for TLS where an endpoint does not say it. Default: TLS if one of
            the next arguments is given.
        tls_ca: PEM file with the authorities that sign the workers' certificates.
            Default: gRPC's own list of public authorities.
        tls_client_cert: PEM file with this client's certificate chain.
        tls_client_key: PEM file with the key of ``tls_client_cert``.
        token: Bearer token of every call.
        token_file: File with the bearer token, read for every call: its first line
            that is neither empty nor a comment (#).

    Raises:
        ValueError: An endpoint is malformed, or arguments contradict each other.

    A call that no worker answers is repeated for 10 s, and a call that a full worker
    rejects after the time that the worker asks for, within ``timeout``. All methods
    raise :class:`~imagegpt.WorkerError`, or a more special class of it, when a call
    fails as a whole, and :class:`~imagegpt.ClosedError` after :meth:`close`.
    """

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
        self._inner: AsyncClient | None = AsyncClient(**self._arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_unpickled, (self._arguments, self._closed))

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections; calls in progress in other threads fail with
        :class:`~imagegpt.ClosedError`."""
        if self._closed:
            return
        self._closed = True
        if self._process == os.getpid() and self._inner is not None:
            _Loop.get().run(self._inner.close())

    def _client(self) -> AsyncClient:
        if self._closed:
            raise ClosedError("the client is closed")
        # Before the parent's connections are dropped, which a process that cannot
        # use gRPC does not survive.
        _Loop.get()
        with self._lock:
            if self._inner is None or self._process != os.getpid():
                self._inner, self._process = AsyncClient(**self._arguments), os.getpid()
            return self._inner

    def model(self, *, timeout: float | None = None) -> ModelInfo:
        """Returns the model that the workers serve, asked anew.

        Args:
            timeout: Instead of the client's, in seconds.

        Raises:
            ModelMismatchError: The model has another digest than the client's.
        """
        return _Loop.get().run(self._client().model(timeout=timeout))

    @overload
    def embed(
        self,
        images: Iterable[ImageInput],
        *,
        layers: Layers = ...,
        pooling: Pooling = ...,
        fit: Fit | None = ...,
        alpha: Alpha | None = ...,
        context: Context = ...,
        norm: Norm = ...,
        normalize: bool = ...,
        dtype: Dtype = ...,
        priority: Priority | None = ...,
        timeout: float | None = ...,
        on_error: Literal["raise"] = ...,
    ) -> NDArray[Any]: ...

    @overload
    def embed(
        self,
        images: Iterable[ImageInput],
        *,
        layers: Layers = ...,
        pooling: Pooling = ...,
        fit: Fit | None = ...,
        alpha: Alpha | None = ...,
        context: Context = ...,
        norm: Norm = ...,
        normalize: bool = ...,
        dtype: Dtype = ...,
        priority: Priority | None = ...,
        timeout: float | None = ...,
        on_error: Literal["return"],
    ) -> list[NDArray[Any] | ImageError]: ...

    def embed(
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
        """Returns feature vectors of images, for linear probes and similarity search.

        Args:
            images: Images in any form of :data:`~imagegpt.ImageInput`, n of them.
            layers: Layer whose features are returned, or several layers of one run
                in ascending order, or ``"all"`` that the model serves. Default: the
                model's ``layer_default``.
            pooling: ``"mean"`` over all positions, the state of the ``"last"``
                position, or ``"none"``: the states of all positions. The last two
                exist only for the last layer.
            fit: ``"squash"`` (default) or ``"center-crop"``.
            alpha: Colors of transparent pixels: stored (``"drop"``, the default), or
                ``"white"``.
            context: ``"raw"``: the image's tokens; ``"sos-shifted"``: the start token
                first, as in pre-training.
            norm: ``"pre-attn-rms"``, as in the paper, or ``"none"``: the residual
                stream itself.
            normalize: True to scale each vector to length 1.
            dtype: ``"f32"`` or ``"f16"``.
            priority: ``"interactive"`` (default) or ``"bulk"``.
            timeout: Instead of the client's, in seconds.
            on_error: ``"raise"`` raises the first image's error, ``"return"``
                returns errors in the places of vectors.

        Returns:
            Vectors, float32 or float16, in the order of the images. Shape (n, d) for
            one layer, (n, layers, d) if ``layers`` are several or a list; with
            ``pooling="none"`` an axis of positions before d. With
            ``on_error="return"`` a list of n arrays or errors instead.

        Raises:
            ImageError: An image failed, with ``on_error="raise"``.
            InvalidRequestError: The model does not have these features.
        """
        client: Any = self._client()
        return _Loop.get().run(
            client.embed(
                images,
                layers=layers,
                pooling=pooling,
                fit=fit,
                alpha=alpha,
                context=context,
                norm=norm,
                normalize=normalize,
                dtype=dtype,
                priority=priority,
                timeout=timeout,
                on_error=on_error,
            )
        )

    @overload
    def classify(
        self,
        images: Iterable[ImageInput],
        *,
        top_k: int = ...,
        logits: bool = ...,
        head: str = ...,
        fit: Fit | None = ...,
        alpha: Alpha | None = ...,
        priority: Priority | None = ...,
        timeout: float | None = ...,
        on_error: Literal["raise"] = ...,
    ) -> list[Classification]: ...

    @overload
    def classify(
        self,
        images: Iterable[ImageInput],
        *,
        top_k: int = ...,
        logits: bool = ...,
        head: str = ...,
        fit: Fit | None = ...,
        alpha: Alpha | None = ...,
        priority: Priority | None = ...,
        timeout: float | None = ...,
        on_error: Literal["return"],
    ) -> list[Classification | ImageError]: ...

    def classify(
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
        """Returns class scores of images, from the checkpoint's own head or a linear
        head.

        Args:
            images: Images in any form of :data:`~imagegpt.ImageInput`.
            top_k: Number of classes to return, best first.
            logits: True to return the logits of all classes too.
            head: Name of a linear head. Default: the checkpoint's own head, or the
                only linear head.
            fit: As in :meth:`embed`; a linear head may demand one.
            alpha: As in :meth:`embed`; a linear head may demand one.
            priority: ``"interactive"`` (default) or ``"bulk"``.
            timeout: Instead of the client's, in seconds.
            on_error: As in :meth:`embed`.

        Raises:
            ImageError: An image failed, with ``on_error="raise"``.
            NotFoundError: The worker has no head of this name.
            UnimplementedError: The model cannot classify.
        """
        client: Any = self._client()
        return _Loop.get().run(
            client.classify(
                images,
                top_k=top_k,
                logits=logits,
                head=head,
                fit=fit,
                alpha=alpha,
                priority=priority,
                timeout=timeout,
                on_error=on_error,
            )
        )

    @overload
    def score(
        self,
        images: Iterable[ImageInput],
        *,
        map: bool = ...,
        complexity: bool = ...,
        fit: Fit | None = ...,
        alpha: Alpha | None = ...,
        priority: Priority | None = ...,
        timeout: float | None = ...,
        on_error: Literal["raise"] = ...,
    ) -> list[Score]: ...

    @overload
    def score(
        self,
        images: Iterable[ImageInput],
        *,
        map: bool = ...,
        complexity: bool = ...,
        fit: Fit | None = ...,
        alpha: Alpha | None = ...,
        priority: Priority | None = ...,
        timeout: float | None = ...,
        on_error: Literal["return"],
    ) -> list[Score | ImageError]: ...

    def score(
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
        """Returns the negative log-likelihood of images under the model, in nats and
        bits.

        Args:
            images: Images in any form of :data:`~imagegpt.ImageInput`.
            map: True to return the part of each pixel too.
            complexity: True to return the compressed size of the tokens too.
            fit: As in :meth:`embed`.
            alpha: As in :meth:`embed`.
            priority: ``"interactive"`` (default) or ``"bulk"``.
            timeout: Instead of the client's, in seconds.
            on_error: As in :meth:`embed`.

        Raises:
            ImageError: An image failed, with ``on_error="raise"``.
            UnimplementedError: The model cannot score.
        """
        client: Any = self._client()
        return _Loop.get().run(
            client.score(
                images,
                map=map,
                complexity=complexity,
                fit=fit,
                alpha=alpha,
                priority=priority,
                timeout=timeout,
                on_error=on_error,
            )
        )

    @overload
    def tokenize(
        self,
        images: Iterable[ImageInput],
        *,
        fit: Fit | None = ...,
        alpha: Alpha | None = ...,
        priority: Priority | None = ...,
        timeout: float | None = ...,
        on_error: Literal["raise"] = ...,
    ) -> NDArray[numpy.uint16]: ...

    @overload
    def tokenize(
        self,
        images: Iterable[ImageInput],
        *,
        fit: Fit | None = ...,
        alpha: Alpha | None = ...,
        priority: Priority | None = ...,
        timeout: float | None = ...,
        on_error: Literal["return"],
    ) -> list[NDArray[numpy.uint16] | ImageError]: ...

    def tokenize(
        self,
        images: Iterable[ImageInput],
        *,
        fit: Fit | None = None,
        alpha: Alpha | None = None,
        priority: Priority | None = None,
        timeout: float | None = None,
        on_error: OnError = "raise",
    ) -> NDArray[numpy.uint16] | list[NDArray[numpy.uint16] | ImageError]:
        """Returns the color tokens that the model would see, uint16 (n, positions) in
        raster order, without running the model.

        Args:
            images: Images in any form of :data:`~imagegpt.ImageInput`.
            fit: As in :meth:`embed`.
            alpha: As in :meth:`embed`.
            priority: ``"interactive"`` (default) or ``"bulk"``.
            timeout: Instead of the client's, in seconds.
            on_error: As in :meth:`embed`.

        Raises:
            ImageError: An image failed, with ``on_error="raise"``.
        """
        client: Any = self._client()
        return _Loop.get().run(
            client.tokenize(
                images,
                fit=fit,
                alpha=alpha,
                priority=priority,
                timeout=timeout,
                on_error=on_error,
            )
        )

    @overload
    def generate(
        self,
        *,
        samples: int = ...,
        prefix: Any = ...,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        seed: int | None = ...,
        scale: int = ...,
        log_probs: bool = ...,
        priority: Priority | None = ...,
        timeout: float | None = ...,
        on_error: Literal["raise"] = ...,
    ) -> list[GeneratedImage]: ...

    @overload
    def generate(
        self,
        *,
        samples: int = ...,
        prefix: Any = ...,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        seed: int | None = ...,
        scale: int = ...,
        log_probs: bool = ...,
        priority: Priority | None = ...,
        timeout: float | None = ...,
        on_error: Literal["return"],
    ) -> list[GeneratedImage | ImageError]: ...

    def generate(
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
        """Generates images pixel by pixel.

        Args:
            samples: Number of images.
            prefix: First tokens of the images, an array of integers (k,). Default:
                none.
            temperature: Divisor of the logits; 0 always takes the likeliest color.
            top_k: Number of likeliest colors from which is drawn; 0 for all.
            top_p: Smallest probability of the set of likeliest colors from which is
                drawn; 1 for all.
            seed: Seed of the random draws. Default: one that the worker draws, and
                that the results have.
            scale: Side in pixels of the square that shows a pixel of the image.
            log_probs: True to return the log probability of each drawn color.
            priority: ``"interactive"`` (default) or ``"bulk"``.
            timeout: Instead of the client's, in seconds, for all samples together.
            on_error: ``"raise"`` raises the first sample's error, ``"return"``
                returns errors in the places of images.

        Raises:
            InvalidRequestError: An option is out of bounds.
            UnimplementedError: The model cannot generate.
        """
        client: Any = self._client()
        return _Loop.get().run(
            client.generate(
                samples=samples,
                prefix=prefix,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                scale=scale,
                log_probs=log_probs,
                priority=priority,
                timeout=timeout,
                on_error=on_error,
            )
        )

    @overload
    def complete(
        self,
        image: ImageInput,
        *,
        rows: int | None = ...,
        mask: Any = ...,
        samples: int = ...,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        seed: int | None = ...,
        scale: int = ...,
        log_probs: bool = ...,
        fit: Fit | None = ...,
        alpha: Alpha | None = ...,
        priority: Priority | None = ...,
        timeout: float | None = ...,
        on_error: Literal["raise"] = ...,
    ) -> list[GeneratedImage]: ...

    @overload
    def complete(
        self,
        image: ImageInput,
        *,
        rows: int | None = ...,
        mask: Any = ...,
        samples: int = ...,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        seed: int | None = ...,
        scale: int = ...,
        log_probs: bool = ...,
        fit: Fit | None = ...,
        alpha: Alpha | None = ...,
        priority: Priority | None = ...,
        timeout: float | None = ...,
        on_error: Literal["return"],
    ) -> list[GeneratedImage | ImageError]: ...

    def complete(
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
        """Generates the rest of an image of which a part is kept.

        Args:
            image: Image in any form of :data:`~imagegpt.ImageInput`.
            rows: Number of rows that are kept, from the top, 0 to ``side``.
            mask: Pixels that are kept, booleans (side, side) or (positions,).
                Pixels before a kept pixel in raster order are generated without
                knowledge of it. Give either ``rows`` or ``mask``.
            samples: Number of completions.
            fit: As in :meth:`embed`.
            alpha: As in :meth:`embed`.
            temperature, top_k, top_p, seed, scale, log_probs, priority, timeout,
                on_error: As in :meth:`generate`.

        Raises:
            InvalidImageError: The image cannot be used.
            InvalidRequestError: An option is out of bounds.
            UnimplementedError: The model cannot generate.
        """
        client: Any = self._client()
        return _Loop.get().run(
            client.complete(
                image,
                rows=rows,
                mask=mask,
                samples=samples,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                scale=scale,
                log_probs=log_probs,
                fit=fit,
                alpha=alpha,
                priority=priority,
                timeout=timeout,
                on_error=on_error,
            )
        )

    @overload
    def embed_stream(
        self,
        images: Iterable[Any],
        *,
        layers: Layers = ...,
        pooling: Pooling = ...,
        fit: Fit | None = ...,
        alpha: Alpha | None = ...,
        context: Context = ...,
        norm: Norm = ...,
        normalize: bool = ...,
        dtype: Dtype = ...,
        ordered: bool = ...,
        window: int = ...,
        item_timeout: float = ...,
        give_up_after: float = ...,
        priority: Priority | None = ...,
        on_error: Literal["return"] = ...,
    ) -> Iterator[tuple[Any, NDArray[Any] | ImageError]]: ...

    @overload
    def embed_stream(
        self,
        images: Iterable[Any],
        *,
        layers: Layers = ...,
        pooling: Pooling = ...,
        fit: Fit | None = ...,
        alpha: Alpha | None = ...,
        context: Context = ...,
        norm: Norm = ...,
        normalize: bool = ...,
        dtype: Dtype = ...,
        ordered: bool = ...,
        window: int = ...,
        item_timeout: float = ...,
        give_up_after: float = ...,
        priority: Priority | None = ...,
        on_error: Literal["raise"],
    ) -> Iterator[tuple[Any, NDArray[Any]]]: ...

    def embed_stream(
        self,
        images: Iterable[Any],
        *,
        layers: Layers = None,
        pooling: Pooling = "mean",
        fit: Fit | None = None,
        alpha: Alpha | None = None,
        context: Context = "raw",
        norm: Norm = "pre-attn-rms",
        normalize: bool = False,
        dtype: Dtype = "f32",
        ordered: bool = False,
        window: int = 0,
        item_timeout: float = 60.0,
        give_up_after: float = 600.0,
        priority: Priority | None = None,
        on_error: OnError = "return",
    ) -> Iterator[tuple[Any, Any]]:
        """Embeds any number of images over all workers, in bounded memory.

        Every image is given out once: as a vector or as an error. A worker that
        ends, drains, hangs or closes its connection is left out for a while, and
        its images go to other workers, or to the same one when it is back; images
        that have an answer are not sent again. The iterable is read in the calling
        thread, and only as far as the workers have room.

        Args:
            images: Images in any form of :data:`~imagegpt.ImageInput`, or pairs of an
                id and an image. The id may be anything; without one an image's id is
                its number, from 0.
            layers, pooling, fit, alpha, context, norm, normalize, dtype: As in
                :meth:`embed`.
            ordered: True to give images out in the order of the iterable, and not as
                they are done.
            window: Largest number of images that one worker has at the same time; 0
                uses the worker's own limit.
            item_timeout: Longest time in seconds without an answer from a worker that
                has images.
            give_up_after: Time in seconds without an answer from any worker after
                which the stream fails; 30 s if the client has never reached one.
            priority: ``"bulk"`` (default) or ``"interactive"``.
            on_error: ``"return"`` gives errors out in the places of vectors,
                ``"raise"`` raises the first one.

        Yields:
            Pairs of an id and a vector: (d,), or (layers, d) if ``layers`` are
            several or a list. A vector is read-only; copy it to change it.

        Raises:
            ImageError: An image failed, with ``on_error="raise"``.
            UnavailableError: No worker answered for too long.
            ModelMismatchError: All workers serve another model than the first answer
                came from, or than the client's digest.
            WorkerError: ``items`` of these errors are the ids without an answer.
        """
        client = self._client()
        check_on_error(on_error)
        check_stream_options(window, item_timeout, give_up_after)
        embed = EmbedOptions.checked(layers, pooling, fit, alpha, context, norm, normalize, dtype)
        options = StreamOptions(
            window=window,
            item_timeout=item_timeout,
            give_up_after=give_up_after,
            priority=priority,
            digest=self._arguments["digest"],
            is_known=client._model is not None,
        )
        return self._stream(client, images, embed, options, ordered, on_error == "raise")

    def _stream(
        self,
        client: AsyncClient,
        images: Iterable[Any],
        embed: EmbedOptions,
        options: StreamOptions,
        is_ordered: bool,
        raises: bool,
    ) -> Iterator[tuple[Any, Any]]:
        ledger = Ledger(is_ordered)
        # What the loop says: an answer, an error, or None when a worker has opened a
        # stream. Bounded by the ledger, since each image has one answer.
        news: queue.SimpleQueue[Any] = queue.SimpleQueue()
        loop = _Loop.get()
        stream = EmbedStream(
            client._connections, embed, options, news.put, news.put, lambda: news.put(None)
        )
        loop.loop.call_soon_threadsafe(stream.start)
        source = iter(images)
        is_done = False
        batch: list[Task] = []

        def hand_over() -> None:
            if batch:
                loop.loop.call_soon_threadsafe(stream.add, batch.copy())
                batch.clear()

        def take(is_waiting: bool) -> bool:
            """Takes what the loop says into account; False if it says nothing."""
            try:
                # Wakes up now and then, to notice that the client was closed.
                word = news.get(timeout=1.0) if is_waiting else news.get_nowait()
            except queue.Empty:
                return False
            if isinstance(word, BaseException):
                raise with_items(word, ledger)
            if word is not None:
                task, outcome = word
                if not isinstance(outcome, ImageError):
                    outcome = as_given(outcome, embed)
                ledger.settle(task.number, outcome)
            return True

        try:
            while True:
                if self._closed:
                    raise ClosedError("the client is closed")
                while take(is_waiting=False):
                    pass
                outcome = ledger.pop()
                if outcome is not None:
                    hand_over()
                    if raises and isinstance(outcome[1], ImageError):
                        raise outcome[1]
                    yield outcome
                elif not is_done and ledger.has_room(stream.capacity):
                    try:
                        item = next(source)
                    except StopIteration:
                        is_done = True
                        continue
                    task = accept(ledger, item, stream.image_bytes_max)
                    if task is not None:
                        batch.append(task)
                    if len(batch) >= _HANDOVER:
                        hand_over()
                elif is_done and ledger.is_empty():
                    return
                else:
                    hand_over()
                    take(is_waiting=True)
        finally:
            loop.run(stream.close())


def _unpickled(arguments: dict[str, Any], is_closed: bool) -> Client:
    client = Client(**arguments)
    client._closed = is_closed
    return client
