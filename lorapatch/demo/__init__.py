"""A miniature of the competition toolkit, in which the script of the plan runs unchanged: see `make_demo`."""

from __future__ import annotations

from lorapatch.demo.layout import SCRIPT, make_demo

__all__ = ["SCRIPT", "make_demo"]
