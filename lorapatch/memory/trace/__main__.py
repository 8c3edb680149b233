"""The traced process: a run as JSON on standard input, its breakdown or a refusal as JSON on standard output."""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

from lorapatch.errors import LorapatchError
from lorapatch.memory.trace.exchange import breakdown_to, setup_from

__all__ = ["answer", "main"]


def main() -> None:
    """Answer one question; libraries that talk on standard output are sent to standard error."""
    answer_to = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    question = json.load(sys.stdin)
    answer_to.write(json.dumps(answer(question)) + "\n")
    answer_to.close()


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """``{"breakdown": …}``, or ``{"refused": …}`` with one sentence; the traceback of a surprise goes to standard error."""
    setup = setup_from(question["setup"])
    try:
        from lorapatch.memory.trace.run import measure

        return {"breakdown": breakdown_to(measure(setup, question["architecture"], question["capacity"]))}
    except LorapatchError as error:
        return {"refused": str(error)}
    except ImportError as error:
        traceback.print_exc()
        missing = error.name or str(error)
        return {"refused": f"{sys.executable} cannot trace a {setup.trainer} run: it lacks {missing} ({_first(error)})"}
    except Exception as error:
        traceback.print_exc()
        if type(error).__name__ == "TrainerError":
            return {"refused": _first(error)}
        return {"refused": f"{setup.model} cannot be traced ({type(error).__name__}: {_first(error)})"}


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    main()
