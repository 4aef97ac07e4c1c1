"""How figures are written, on a terminal and in a notebook."""

from __future__ import annotations

from collections.abc import Mapping

from mvmr.bundles.description import table

_PERCENT = ("top", "map_11point", "map_area", "balanced_accuracy", "macro_f1")


def format_figure(name: str, value: float) -> str:
    """A figure of a protocol: accuracies and precisions in percent, anything else as a number."""
    return f"{value:.1f} %" if name.startswith(_PERCENT) else shorten_number(value)


def shorten_number(value: float) -> str:
    """Three digits, and a thousand or more in full: 0.0123, 46.2, 1,460."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def format_figures(values: Mapping[str, float]) -> str:
    """The figures of a protocol on one line."""
    return ", ".join(f"{name} {format_figure(name, value)}" for name, value in values.items())


class Evaluation(dict[str, dict[str, float]]):
    """Figures by name for each protocol; in a notebook a table."""

    def _repr_html_(self) -> str:
        return table([(protocol, format_figures(values)) for protocol, values in self.items()])
