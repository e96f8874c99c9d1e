"""Replacing generated text between markers."""

import pytest

from scripts.errors import UserError
from scripts.readme import between_markers

PAGE = "# Title\n<!-- noisebench:table -->\nold\n<!-- /noisebench:table -->\nend <!-- noisebench:other -->\n"


def test_only_what_is_between_the_markers_changes() -> None:
    expected = "# Title\n<!-- noisebench:table -->\n| a |\n<!-- /noisebench:table -->\nend <!-- noisebench:other -->\n"
    assert between_markers(PAGE, "table", "\n| a |\n") == expected


def test_second_pass_changes_nothing() -> None:
    once = between_markers(PAGE, "table", r"a \1 \g<0> b")
    assert between_markers(once, "table", r"a \1 \g<0> b") == once


def test_markers_on_one_line_get_lines_of_their_own() -> None:
    text = "<!-- noisebench:x --><!-- /noisebench:x -->"
    assert between_markers(text, "x", "a") == "<!-- noisebench:x -->\na\n<!-- /noisebench:x -->"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- /noisebench:x -->", "page.md: marker <!-- noisebench:x --> is missing"),
        ("<!-- noisebench:x -->", "page.md: marker <!-- /noisebench:x --> is missing"),
        ("<!-- noisebench:x -->" * 2 + "<!-- /noisebench:x -->", "<!-- noisebench:x --> is there 2 times"),
        ("<!-- noisebench:x -->" + "<!-- /noisebench:x -->" * 2, "<!-- /noisebench:x --> is there 2 times"),
        ("<!-- /noisebench:x --><!-- noisebench:x -->", "<!-- /noisebench:x --> comes before <!-- noisebench:x -->"),
    ],
)
def test_marker_that_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        between_markers(text, "x", "new", place="page.md")


def test_new_text_cannot_break_the_markers() -> None:
    with pytest.raises(ValueError, match="must not hold <!-- /noisebench:table -->"):
        between_markers(PAGE, "table", "a <!-- /noisebench:table --> b")
