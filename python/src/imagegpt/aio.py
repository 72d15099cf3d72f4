"""Client for asyncio programs."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Callable,
    Coroutine,
    Iterable,
)
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

__all__ = ["AsyncClient"]


class AsyncClient(ClientBase):
    """Client of one or more workers that serve the same model, for asyncio.

    The methods have the arguments, results and errors of :class:`imagegpt.Client`,
    which describes them, and are coroutines; ``embed_stream`` is an asynchronous
    iterator. The arguments of the class are those of ``Client`` too. A client may be
    used in several event loops: calls run in a thread of their own.
    """

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections; calls in progress fail with
        :class:`~imagegpt.ClosedError`."""
        inner = self._closing()
        if inner is not None:
            await self._run(inner.close())

    @staticmethod
    async def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return await asyncio.wrap_future(GrpcLoop.get().submit(coroutine))

    async def model(self, *, timeout: float | None = None) -> ModelInfo:
        """Returns the model that the workers serve."""
        core = self._core()
        return await self._run(core.model(timeout=timeout))

    @overload
    async def embed(
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
    async def embed(
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
        core = self._core()
        given = check_images(images)
        return await self._run(
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
    async def classify(
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
    async def classify(
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
        core = self._core()
        given = check_images(images)
        return await self._run(
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
    async def score(
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
    async def score(
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
        core = self._core()
        given = check_images(images)
        return await self._run(
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
    async def tokenize(
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
    async def tokenize(
        self,
        images: Iterable[ImageInput],
        *,
        fit: Fit | None = ...,
        alpha: Alpha | None = ...,
        priority: Priority | None = ...,
        timeout: float | None = ...,
        on_error: Literal["return"],
    ) -> list[NDArray[numpy.uint16] | ImageError]: ...

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
        core = self._core()
        given = check_images(images)
        return await self._run(
            core.tokenize(
                given, fit=fit, alpha=alpha, priority=priority, timeout=timeout, on_error=on_error
            )
        )

    @overload
    async def generate(
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
    async def generate(
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
        core = self._core()
        return await self._run(
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
    async def complete(
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
    async def complete(
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
        core = self._core()
        return await self._run(
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

    def embed_stream(
        self,
        images: Iterable[Any] | AsyncIterable[Any],
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
    ) -> AsyncGenerator[tuple[Any, Any], None]:
        """Embeds any number of images; see :meth:`imagegpt.Client.embed_stream`.

        ``images`` may also be an asynchronous iterable. A plain iterable is read
        within the event loop, so it should not block.
        """
        core = self._core()
        if not isinstance(images, AsyncIterable):
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
        return self._stream(core, images, embed, options, ordered, on_error == "raise")

    async def _stream(
        self,
        core: ClientCore,
        images: Iterable[Any] | AsyncIterable[Any],
        embed: EmbedOptions,
        options: StreamOptions,
        is_ordered: bool,
        raises: bool,
    ) -> AsyncGenerator[tuple[Any, Any], None]:
        ledger = Ledger(is_ordered)
        here, changed = asyncio.get_running_loop(), asyncio.Event()
        failures: list[BaseException] = []

        def settle(answer: tuple[Task, Any]) -> None:
            task, outcome = answer
            if not isinstance(outcome, ImageError):
                outcome = as_given(outcome, embed)
            ledger.settle(task.number, outcome)
            changed.set()

        def fail(error: BaseException) -> None:
            failures.append(error)
            changed.set()

        def tell(call: Callable[..., None], *arguments: Any) -> None:
            # This loop may have been closed with the stream unfinished.
            with contextlib.suppress(RuntimeError):
                here.call_soon_threadsafe(call, *arguments)

        source: Any = aiter(images) if isinstance(images, AsyncIterable) else iter(images)
        pull = _pull_async if isinstance(images, AsyncIterable) else _pull
        loop = GrpcLoop.get()
        stream = core.stream(
            embed,
            options,
            functools.partial(tell, settle),
            functools.partial(tell, fail),
            functools.partial(tell, changed.set),
        )
        owner = StreamOwner(loop, stream.close)
        is_done = False
        try:
            loop.soon(stream.start)
            while True:
                loop.check_own()
                self._check_usable(ledger)
                outcome = ledger.pop()
                if outcome is not None:
                    if raises and isinstance(outcome[1], ImageError):
                        raise outcome[1]
                    yield outcome
                elif failures:
                    raise with_items(failures[0], ledger)
                elif not is_done and ledger.has_room(stream.capacity):
                    item, is_done = await pull(source)
                    if not is_done:
                        task = accept(ledger, item, stream)
                        if task is not None:
                            loop.soon(stream.add, [task])
                        # Lets other tasks run although nothing was waited for.
                        await asyncio.sleep(0)
                elif is_done and ledger.is_empty():
                    return
                else:
                    changed.clear()
                    # Wakes up now and then, to notice that the client was closed.
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(1.0):
                            await changed.wait()
        finally:
            if loop.is_own and not sys.is_finalizing():
                # A task that is canceled meanwhile does not cancel the end.
                await asyncio.shield(asyncio.wrap_future(loop.submit(stream.close())))
            owner.release()


async def _pull(source: Any) -> tuple[Any, bool]:
    try:
        return next(source), False
    except StopIteration:
        return None, True


async def _pull_async(source: Any) -> tuple[Any, bool]:
    try:
        return await anext(source), False
    except StopAsyncIteration:
        return None, True
