"""Every error lorapatch raises on purpose: one sentence that says what to do, and the exit code it leads to."""

from __future__ import annotations

__all__ = ["LorapatchError", "Refused", "RunFailed", "UsageError"]


class LorapatchError(Exception):
    """An error with a sentence for the user; ``exit_code`` is what the command line ends with."""

    exit_code = 3


class UsageError(LorapatchError):
    """A value given by the user is out of its range (exit code 2)."""

    exit_code = 2


class Refused(LorapatchError):
    """Nothing was done, because it could not be done safely; the message is the reason (exit code 3)."""


class RunFailed(LorapatchError):
    """A training run failed; the message is the diagnosis (exit code 4)."""

    exit_code = 4
