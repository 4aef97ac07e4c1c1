"""Strangers' words stay on one line, and not too many of them."""

from mvmr.errors import one_line, shorten, summarise


def test_an_error_is_one_line_that_is_never_empty() -> None:
    assert one_line(ValueError("bad\n  header\n")) == "bad header"
    assert one_line(TimeoutError()) == "TimeoutError"
    assert summarise(KeyError("a\nb")) == r"KeyError: 'a\nb'"


def test_what_is_long_is_cut() -> None:
    assert one_line("word " * 100) == f"{('word ' * 100)[:197]}..."
    assert len(shorten("x" * 1000)) == 80
