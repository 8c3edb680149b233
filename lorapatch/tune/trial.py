"""What tuning knows: predictions, the runs so far and what each showed. Data only, to and from JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from lorapatch.errors import UsageError
from lorapatch.tune.configuration import Configuration
from lorapatch.tune.learning import Learning, judge

__all__ = ["Goal", "Predict", "Prediction", "Trial"]

PREFERENCES = ("speed", "memory", "quality")


class Prediction(NamedTuple):
    """Bytes that a run will take of one GPU, as nvidia-smi counts them, with their bounds; ``outside`` of them are not the
    allocator's (CUDA context, NCCL). ``way`` is "trace" or "closed form"."""

    low: int
    expected: int
    high: int
    outside: int = 0
    way: str = "closed form"


# The bytes of a configuration; by a trace when the second argument is True. None: nobody can say.
Predict = Callable[[Configuration, bool], Prediction | None]


@dataclass(frozen=True)
class Goal:
    """What tuning is to reach: ``budget_B`` bytes of the GPU (of host memory without one), and within which limits.

    ``steps`` are the lengths of the learning runs, each longer than the one before. Raises UsageError.
    """

    budget_B: int
    prefer: str = "speed"
    steps: tuple[int, ...] = (5, 20, 50)
    max_runs: int = 12
    time_limit_s: float | None = None

    def __post_init__(self) -> None:
        if self.budget_B <= 0:
            raise UsageError("--budget has to be more than 0, such as 24GiB")
        if self.prefer not in PREFERENCES:
            raise UsageError(f"--prefer {self.prefer}: choose one of {', '.join(PREFERENCES)}")
        if self.max_runs < 1:
            raise UsageError(f"--max-runs has to be at least 1, not {self.max_runs}")
        if self.time_limit_s is not None and self.time_limit_s <= 0:
            raise UsageError("--time-limit has to be more than 0, such as 2h")
        if not self.steps or min(self.steps) < 2 or list(self.steps) != sorted(set(self.steps)):
            shown = ",".join(map(str, self.steps))
            raise UsageError(f"--steps {shown}: whole numbers from 2 on, each larger than the one before, such as 5,20,50")


@dataclass(frozen=True)
class Trial:
    """One run that has ended. ``purpose`` is "probe" (memory, speed) or "learn"; ``accumulation`` what it ran with.

    ``outcome``: "fits", "over" (it ran, and took more than the budget), "oom", "failed", "timeout" (cut short by the
    limit of the session) or "interrupted"; of one that failed ``diagnosis`` is the diagnosis's id, ``cause`` and
    ``remedy`` are its words. ``expected_B`` is the prediction as corrected by the runs before. ``measured_B`` is None
    where the run was too short, or failed: that says nothing of what it takes. ``rates`` are the learning rates logged
    with ``losses``; ``first_step_s`` the seconds to the first of them; ``held_out`` the loss on held-out data at the end,
    where the script has any.
    """

    number: int
    purpose: str
    configuration: Configuration
    steps: int
    accumulation: int
    reason: str
    outcome: str
    predicted: Prediction | None = None
    expected_B: int | None = None
    measured_B: int | None = None
    samples_per_s: float | None = None
    losses: tuple[float, ...] = ()
    seconds: float = 0.0
    folder: str = ""
    cause: str = ""
    diagnosis: str = ""
    remedy: str = ""
    rates: tuple[float | None, ...] = ()
    first_step_s: float | None = None
    held_out: float | None = None

    @property
    def cut_short(self) -> bool:
        """Whether the session's time ended it."""
        return self.outcome == "timeout"

    @property
    def fits(self) -> bool:
        """Whether it ran within the budget; cut short, whether it did so for long enough to know its memory."""
        return self.outcome == "fits" or (self.cut_short and self.measured_B is not None)

    @property
    def too_large(self) -> bool:
        """Whether the memory was too small for it."""
        return self.outcome in ("over", "oom")

    @property
    def peak_B(self) -> int | None:
        """What it was seen to take, if it lived to take it."""
        return self.measured_B if self.fits or self.too_large else None

    @property
    def counts(self) -> bool:
        """Whether there is something to go by: a run that was cut short before it showed anything is done again."""
        if not self.cut_short:
            return True
        return self.fits and (self.purpose == "probe" or self.learning.state not in ("unknown", "flat", "weak"))

    @property
    def learning(self) -> Learning:
        """What its losses say."""
        return judge(self.losses, self.rates)

    @property
    def final(self) -> float | None:
        """The loss that it is compared by: on held-out data, else where the line through its losses ends."""
        return self.held_out if self.held_out is not None else self.learning.final

    def as_dict(self) -> dict[str, Any]:
        """For tune.json."""
        learning = self.learning
        return {
            **asdict(self),
            "losses": [loss if loss == loss and abs(loss) != float("inf") else str(loss) for loss in self.losses],
            "predicted": self.predicted._asdict() if self.predicted else None,
            "learning": {"state": learning.state, "sentence": learning.sentence},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trial:
        """The way back from tune.json. Raises KeyError, TypeError or ValueError for what is not a trial."""
        known = {name: data[name] for name in cls.__dataclass_fields__}
        trial = cls(**known)
        return replace(
            trial,
            configuration=Configuration(**data["configuration"]),
            predicted=Prediction(**data["predicted"]) if data["predicted"] else None,
            losses=tuple(float(loss) for loss in data["losses"]),
            rates=tuple(data["rates"]),
        )
