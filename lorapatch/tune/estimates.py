"""`lorapatch.estimate`, asked about a configuration of the script that is tuned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lorapatch.tune.configuration import Configuration, flags_between
from lorapatch.tune.script import TunedScript
from lorapatch.tune.trial import Prediction

__all__ = ["estimator"]


def estimator(
    tuned: TunedScript, trainer_root: Path | None, budget_B: int
) -> Callable[[Configuration, bool], Prediction | None]:
    """A function from a configuration to the device memory of its run: by a trace if asked for, else in closed form."""
    from lorapatch.memory.estimate import estimate

    def ask(configuration: Configuration, exact: bool) -> Prediction | None:
        flags = flags_between(tuned.start, configuration, tuned.launch, tuned.support)
        found = estimate(
            tuned.path,
            tuned.patch,
            settings={name: " ".join(words) or "True" for name, words in flags.items()},
            sides=("after",),
            budget_B=budget_B,
            trainer_root=trainer_root,
            fast=not exact,
            largest=False,
        ).after
        if found is None:
            return None
        outside = found.device.expected - found.reserved.expected
        return Prediction(*found.device, outside=outside, way=found.breakdown.way)

    return ask
