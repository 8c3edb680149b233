"""Rendering, running, watching and recording a script."""

from __future__ import annotations

from lorapatch.run.finish import Report
from lorapatch.run.rendering import RenderedScript, plan_nodes, render_script
from lorapatch.run.runs import RunOptions, full, smoke
from lorapatch.run.watch import monitor

__all__ = ["RenderedScript", "Report", "RunOptions", "full", "monitor", "plan_nodes", "render_script", "smoke"]
