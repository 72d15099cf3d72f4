"""Client for programs without asyncio."""

from __future__ import annotations

import queue
from collections.abc import Generator, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy

from imagegpt.core import (
    ClientBase,
    ClientCore,
    OnError,
    accept,
    as_given,
    check_images,
    check_stream_source,
    with_items,
)
from imagegpt.errors import ImageError
from imagegpt.images import ImageInput
from imagegpt.ledger import Ledger
from imagegpt.loop import GrpcLoop, StreamOwner
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
from imagegpt.stream import StreamOptions, Task

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Client"]

# Images that are handed to the event loop at the same time, since each handover
# wakes it.
_HANDOVER = 8


class Client(ClientBase):
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
        inner = self._closing()
        if inner is not None:
            GrpcLoop.get().finish(inner.close)

    def model(self, *, timeout: float | None = None) -> ModelInfo:
        """Returns the model that the workers serve, asked anew.

        Args:
            timeout: Instead of the client's, in seconds.

        Raises:
            ModelMismatchError: The model has another digest than the client's.
        """
        return GrpcLoop.get().run(self._core().model(timeout=timeout))

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
                in ascending order, or ``"all"`` up to ``layer_default``. Default: the
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
        core = self._core()
        # Read here: an iterable may be bound to this thread, or use the client.
        given = check_images(images)
        return GrpcLoop.get().run(
            core.embed(
                given,
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
        core = self._core()
        # Read here: an iterable may be bound to this thread, or use the client.
        given = check_images(images)
        return GrpcLoop.get().run(
            core.classify(
                given,
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
        core = self._core()
        # Read here: an iterable may be bound to this thread, or use the client.
        given = check_images(images)
        return GrpcLoop.get().run(
            core.score(
                given,
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
        core = self._core()
        # Read here: an iterable may be bound to this thread, or use the client.
        given = check_images(images)
        return GrpcLoop.get().run(
            core.tokenize(
                given,
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
        core = self._core()
        return GrpcLoop.get().run(
            core.generate(
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
        core = self._core()
        return GrpcLoop.get().run(
            core.complete(
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
    ) -> Generator[tuple[Any, NDArray[Any] | ImageError], None, None]: ...

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
    ) -> Generator[tuple[Any, NDArray[Any]], None, None]: ...

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
    ) -> Generator[tuple[Any, Any], None, None]:
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
        core = self._core()
        check_stream_source(images)
        embed, options = core.stream_options(
            layers=layers,
            pooling=pooling,
            fit=fit,
            alpha=alpha,
            context=context,
            norm=norm,
            normalize=normalize,
            dtype=dtype,
            window=window,
            item_timeout=item_timeout,
            give_up_after=give_up_after,
            priority=priority,
            on_error=on_error,
        )
        return self._stream(core, iter(images), embed, options, ordered, on_error == "raise")

    def _stream(
        self,
        core: ClientCore,
        source: Iterator[Any],
        embed: EmbedOptions,
        options: StreamOptions,
        is_ordered: bool,
        raises: bool,
    ) -> Generator[tuple[Any, Any], None, None]:
        ledger = Ledger(is_ordered)
        # What the loop says: an answer, an error, or None when a worker has opened a
        # stream. Bounded by the ledger, since each image has one answer.
        news: queue.SimpleQueue[Any] = queue.SimpleQueue()
        loop = GrpcLoop.get()
        stream = core.stream(embed, options, news.put, news.put, lambda: news.put(None))
        owner = StreamOwner(loop, stream.close)
        is_done = False
        batch: list[Task] = []

        def hand_over() -> None:
            if batch:
                loop.soon(stream.add, batch.copy())
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
            loop.soon(stream.start)
            while True:
                loop.check_own()
                self._check_usable(ledger)
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
                    task = accept(ledger, item, stream)
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
            loop.finish(stream.close)
            owner.release()
