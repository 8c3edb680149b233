"""The one error the trainer raises on purpose: a sentence that says what to do."""

from __future__ import annotations

__all__ = ["TrainerError"]


class TrainerError(Exception):
    """Its message is one sentence for the user; ``train.main`` prints it on standard error and ends with ``exit_code``."""

    def __init__(self, message: str, exit_code: int = 3) -> None:
        super().__init__(message)
        self.exit_code = exit_code
