"""Tune until it fits and learns, in as few and as short runs as possible."""

from __future__ import annotations

from lorapatch.tune.trial import Goal, Prediction, Trial
from lorapatch.tune.tuning import Preview, TuneOptions, Tuning, preview, tune

__all__ = ["Goal", "Prediction", "Preview", "Trial", "TuneOptions", "Tuning", "preview", "tune"]
