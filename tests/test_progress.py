"""Whether progress is shown: as asked for, else where somebody looks on."""

import io
import sys
from types import ModuleType

import pytest

from mvmr.progress import is_wanted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("asked", [True, False])
def test_what_is_asked_for_is_done_anywhere(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert is_wanted(asked) is asked


def test_it_shows_by_itself_at_a_terminal_and_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert is_wanted(None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not is_wanted(None)
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    assert is_wanted(None)
