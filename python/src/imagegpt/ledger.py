"""Account of a stream's images, from when they are taken to when they are given
out."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from imagegpt.errors import ImageError
from imagegpt.stream import BYTES_MAX

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Ledger", "Outcome"]

Outcome = tuple[Hashable, "NDArray[Any] | ImageError"]


class Ledger:
    """Images on their way, in number and in bytes, and outcomes to be given out.

    An image counts until its outcome is given out, so that a caller who does not
    take outcomes adds no further images, also where outcomes wait for their turn.
    """

    def __init__(self, is_ordered: bool) -> None:
        self._is_ordered = is_ordered
        self._on_way: dict[int, tuple[Hashable, int]] = {}
        self._bytes = 0
        self._early: dict[int, Outcome] = {}
        self._ready: deque[Outcome] = deque()
        self._next = 0
        #: Number of the next image.
        self.number = 0

    def accept(self, id: Hashable) -> int:
        """Takes an image in; returns its number."""
        number, self.number = self.number, self.number + 1
        self._on_way[number] = (id, 0)
        return number

    def weigh(self, number: int, n_bytes: int) -> None:
        """Records the size of an image that was taken in."""
        id, _ = self._on_way[number]
        self._on_way[number] = (id, n_bytes)
        self._bytes += n_bytes

    def settle(self, number: int, outcome: NDArray[Any] | ImageError) -> None:
        """Records the outcome of an image."""
        id, n_bytes = self._on_way.pop(number)
        self._bytes -= n_bytes
        if not self._is_ordered:
            self._ready.append((id, outcome))
            return
        self._early[number] = (id, outcome)
        while (due := self._early.pop(self._next, None)) is not None:
            self._ready.append(due)
            self._next += 1

    def has_room(self, capacity: int) -> bool:
        """True if another image may be taken in."""
        n_images = len(self._on_way) + len(self._early) + len(self._ready)
        return n_images < capacity and self._bytes < BYTES_MAX

    def is_empty(self) -> bool:
        """True if every image's outcome has been given out."""
        return not self._on_way and not self._ready

    def pop(self) -> Outcome | None:
        """Gives out the next outcome; ``None`` if there is none yet."""
        return self._ready.popleft() if self._ready else None

    def unanswered(self) -> list[Hashable]:
        """Returns the ids of the images that have no outcome."""
        return [id for id, _ in self._on_way.values()]
