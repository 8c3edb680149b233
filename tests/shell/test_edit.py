"""Edits change their bytes and no others."""

from __future__ import annotations

import pytest

from lorapatch.shell.edit import Edit, apply_edits


def test_edits_are_made_in_order_of_place() -> None:
    assert apply_edits(b"abcdef", [Edit(4, 5, b"X"), Edit(1, 1, b"-"), Edit(2, 3, b"")]) == b"a-bdXf"


def test_no_edit_changes_nothing() -> None:
    assert apply_edits(b"abc", []) == b"abc"


@pytest.mark.parametrize("edits", [[Edit(0, 2, b""), Edit(1, 3, b"")], [Edit(2, 9, b"")], [Edit(2, 1, b"")]])
def test_overlapping_or_outlying_edits_are_an_error(edits: list[Edit]) -> None:
    with pytest.raises(ValueError, match="overlaps"):
        apply_edits(b"abc", edits)
