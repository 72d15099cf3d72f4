"""When a training by the clock slows down and ends, and which of two models is kept.

    decisions.py test    # checks this file itself; tests/it/scripts.rs runs it

Nothing here needs PyTorch: the trainer gives losses and times, and takes decisions.
"""

import math
import sys
from dataclasses import dataclass

# Largest file of weights in the repository.
SIZE_MAX = 16 << 20


@dataclass(frozen=True)
class Decision:
    """What follows a round of training."""

    # This state has the lowest validation loss so far.
    is_best: bool
    # "on", "fall" (the learning rate begins to fall) or "end".
    then: str
    # The state with the lowest loss is taken up again first.
    is_restored: bool = False


class Course:
    """Course of one training: a plateau of the learning rate, then its fall to zero.

    The fall begins when the validation loss has not become lower for `patience` rounds,
    with the best state of the plateau, and takes as long in proportion as that state took;
    or without that in time to end after `seconds`. Times are seconds since the beginning.
    """

    def __init__(self, seconds: float, patience: int, fall: float):
        self.seconds, self.patience, self.fall = seconds, patience, fall
        self.best, self.best_time, self.stale = math.inf, 0.0, 0
        self.fall_begins, self.fall_seconds = math.inf, 0.0

    def rate(self, now: float) -> float:
        """Share of the learning rate at a time."""
        if now < self.fall_begins:
            return 1.0
        return max(0.0, 1 - (now - self.fall_begins) / max(self.fall_seconds, 1e-9))

    def is_over(self, now: float) -> bool:
        """Whether training ends at once, in the middle of a round too."""
        return now >= self.seconds or now >= self.fall_begins + self.fall_seconds

    def after(self, loss: float, now: float) -> Decision:
        """What follows a round that ended now with this validation loss."""
        # A loss that is no number is never the best.
        is_best = loss < self.best
        if is_best:
            self.best, self.best_time, self.stale = loss, now, 0
        else:
            self.stale += 1
        has_stopped = self.stale >= self.patience
        if self.fall_begins < math.inf:
            return Decision(is_best, "end" if has_stopped or self.is_over(now) else "on")
        if self.is_over(now):
            return Decision(is_best, "end")
        if not has_stopped and now < (1 - self.fall) * self.seconds:
            return Decision(is_best, "on")
        left = self.seconds - now
        like_before = self.best_time * self.fall / (1 - self.fall)
        self.fall_begins, self.stale = now, 0
        self.fall_seconds = min(left, like_before) if has_stopped else left
        return Decision(is_best, "fall", is_restored=not is_best and self.best < math.inf)


def share(seconds: float, n_left: int) -> float:
    """Seconds for the next of some trainings; what one leaves over goes to the others."""
    return max(0.0, seconds) / n_left


@dataclass(frozen=True)
class Figures:
    """What a model is judged by."""

    # Nats per token on the test split.
    loss: float
    # Of the head for the categories, on the test split.
    accuracy: float
    log_loss: float
    # Of the file of weights.
    size: int


def loss_against(new: float, old: float) -> list[str]:
    """The reason against a model by its held-out loss alone, if it is one."""
    # Also for a loss that is no number.
    return [] if new < old else [f"its held-out loss of {new:.4f} nats per token is not below {old:.4f}"]


def reasons_against(new: Figures, old: Figures) -> list[str]:
    """Reasons why the old model stays; none if the new one takes its place."""
    reasons = loss_against(new.loss, old.loss)
    # Equal accuracies are common among 379 pictures: then the log loss decides.
    if not (new.accuracy, -new.log_loss) > (old.accuracy, -old.log_loss):
        reasons.append(
            f"its head is right for {new.accuracy:.2%} (log loss {new.log_loss:.4f}), "
            f"not better than {old.accuracy:.2%} ({old.log_loss:.4f})"
        )
    if new.size > SIZE_MAX:
        reasons.append(f"its weights take {new.size} bytes, more than {SIZE_MAX}")
    return reasons


def test() -> None:
    # A loss that rises again: the fall begins with the best state, `patience` rounds later.
    course = Course(seconds=1000, patience=3, fall=0.4)
    losses = [3.0, 2.0, 1.5, 1.6, 1.55, 1.7]
    decisions = [course.after(loss, 10.0 * (idx + 1)) for idx, loss in enumerate(losses)]
    assert [one.is_best for one in decisions] == [True, True, True, False, False, False]
    assert [one.then for one in decisions] == ["on"] * 5 + ["fall"], decisions
    assert decisions[-1].is_restored
    assert course.rate(59.9) == 1.0
    assert course.rate(60.0) == 1.0
    # The best state took 30 s, so that a fall of 40 % takes 20 s more.
    assert abs(course.rate(70.0) - 0.5) < 1e-9
    assert course.rate(80.0) == 0.0
    assert not course.is_over(79.9)
    assert course.is_over(80.1)
    assert course.after(1.4, 70.0) == Decision(True, "on")
    assert course.after(1.3, 80.1) == Decision(True, "end")

    # A loss that goes on falling: the fall begins by the clock, where the training is.
    course = Course(seconds=100, patience=3, fall=0.4)
    assert course.after(2.0, 30.0) == Decision(True, "on")
    assert course.after(1.9, 61.0) == Decision(True, "fall")
    assert abs(course.rate(80.5) - 0.5) < 1e-9
    assert course.is_over(100.0)
    assert not course.is_over(99.0)
    assert course.after(1.8, 100.0).then == "end"

    # A loss that rises while the rate falls ends the training; the best was kept.
    course = Course(seconds=100, patience=2, fall=0.4)
    course.after(2.0, 60.0)
    assert [course.after(loss, 70.0).then for loss in (2.1, 2.2)] == ["on", "end"]
    assert course.best == 2.0

    # A round that is longer than all of the time.
    course = Course(seconds=10, patience=2, fall=0.4)
    assert course.after(2.0, 12.0) == Decision(True, "end")

    # No number is never the best, and there is nothing to take up again.
    course = Course(seconds=100, patience=1, fall=0.4)
    decision = course.after(math.nan, 10.0)
    assert not decision.is_best
    assert not decision.is_restored

    assert share(540.0, 3) == 180.0
    assert share(500.0, 2) == 250.0
    assert share(-1.0, 1) == 0.0

    old = Figures(loss=0.771, accuracy=0.757, log_loss=0.765, size=8 << 20)
    good = Figures(loss=0.700, accuracy=0.780, log_loss=0.700, size=16 << 20)
    assert reasons_against(good, old) == []
    # A model is not better than itself.
    assert len(reasons_against(old, old)) == 2
    for field, value, word in (
        ("loss", 0.771, "loss of 0.7710"),
        ("loss", math.nan, "loss of nan"),
        ("accuracy", 0.750, "75.00%"),
        ("size", SIZE_MAX + 1, "16777217 bytes"),
    ):
        (reason,) = reasons_against(Figures(**{**vars(good), field: value}), old)
        assert word in reason, reason
    equal = Figures(**{**vars(good), "accuracy": old.accuracy})
    assert reasons_against(equal, old) == []
    (reason,) = reasons_against(Figures(**{**vars(equal), "log_loss": 0.8}), old)
    assert "log loss 0.8000" in reason
    print("decisions: fine")


if __name__ == "__main__":
    if sys.argv[1:] != ["test"]:
        sys.exit(__doc__)
    test()
