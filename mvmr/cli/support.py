"""What a library that some commands use can do on this machine, as `mvmr doctor` says it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mvmr.errors import MvmrError


@dataclass(frozen=True, kw_only=True)
class Support:
    """A library: its version, None where it is not installed; what `export` and `serve` lack of it (None: ready)."""

    version: str | None
    export: str | None
    serve: str | None

    @classmethod
    def absent(cls, reason: str) -> Support:
        """One that is not installed."""
        return cls(version=None, export=reason, serve=reason)

    def __str__(self) -> str:
        if self.version is None and self.export is not None and self.export == self.serve:
            return self.export
        uses = {"export": self.export, "serve": self.serve}
        lines = [f"{use}: {lack or 'ready'}" for use, lack in uses.items()]
        return "\n".join([self.version or "not installed", *lines])


def find_lack(call: Callable[[], object]) -> str | None:
    """Say why a call fails, None where it does not."""
    try:
        call()
    except MvmrError as error:
        return str(error)
    except Exception as error:  # a package that is half there fails in many ways, and reporting that is the task
        return f"does not work: {type(error).__name__}: {error}"
    return None
