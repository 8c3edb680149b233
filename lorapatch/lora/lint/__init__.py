"""Will this script do what it says? Checked before anything runs, for people and for CI."""

from __future__ import annotations

from lorapatch.lora.lint.check import CheckOptions, check_script, check_scripts, exit_code
from lorapatch.lora.lint.formats import as_github, as_json, as_sarif, as_text, rule_list
from lorapatch.lora.lint.rule import Diagnostic, Rule, rules

__all__ = [
    "CheckOptions",
    "Diagnostic",
    "Rule",
    "as_github",
    "as_json",
    "as_sarif",
    "as_text",
    "check_script",
    "check_scripts",
    "exit_code",
    "rule_list",
    "rules",
]
