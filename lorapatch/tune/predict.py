"""Predictions of configurations, by `lorapatch.estimate`, each asked for once and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lorapatch.errors import LorapatchError
from lorapatch.tune.configuration import Configuration
from lorapatch.tune.trial import Prediction

__all__ = ["Predictor"]


class Predictor:
    """Asks ``estimate(configuration, exact)`` and remembers the answer; ``refusals`` are its reasons for none.

    ``known`` are answers of an earlier session, as `as_list` gave them.
    """

    def __init__(
        self, estimate: Callable[[Configuration, bool], Prediction | None], known: list[Mapping[str, Any]] | None = None
    ) -> None:
        self._estimate = estimate
        self._answers: dict[tuple[Configuration, bool], Prediction | None] = {}
        self.refusals: list[str] = []
        for item in known or ():
            answer = Prediction(**item["prediction"]) if item["prediction"] else None
            self._answers[Configuration(**item["configuration"]).footprint, item["exact"]] = answer

    def __call__(self, configuration: Configuration, exact: bool = False) -> Prediction | None:
        key = configuration.footprint, exact
        if key not in self._answers:
            try:
                self._answers[key] = self._estimate(configuration, exact)
            except LorapatchError as refusal:
                self.refusals.append(str(refusal))
                self._answers[key] = None
        return self._answers[key]

    def best(self, configuration: Configuration) -> Prediction | None:
        """The most exact answer there is already, else the closed form."""
        return self._answers.get((configuration.footprint, True)) or self(configuration)

    def as_list(self) -> list[dict[str, Any]]:
        """Every answer, for tune.json."""
        return [
            {"configuration": c.as_dict(), "exact": exact, "prediction": answer._asdict() if answer else None}
            for (c, exact), answer in self._answers.items()
        ]
