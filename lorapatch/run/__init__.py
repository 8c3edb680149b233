"""Rendering, running, watching and recording a script."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorapatch.run.finish import Report
    from lorapatch.run.rendering import RenderedScript, plan_nodes, render_script
    from lorapatch.run.runs import RunOptions, full, smoke
    from lorapatch.run.watch import monitor

__all__ = ["RenderedScript", "Report", "RunOptions", "full", "monitor", "plan_nodes", "render_script", "smoke"]

# Where each name lives. Loaded on first use: who asks for the GPUs alone needs no runner.
_HOME_OF = {
    "Report": "finish",
    "RenderedScript": "rendering",
    "plan_nodes": "rendering",
    "render_script": "rendering",
    "RunOptions": "runs",
    "full": "runs",
    "smoke": "runs",
    "monitor": "watch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
