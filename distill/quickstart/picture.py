"""A picture of a result: the nearest neighbours of a few images under two representations, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mvmr.data import ImageSet
from mvmr.storage.atomic import atomic

_TILE, _GAP, _HEADER = 64, 6, 24
_SHARED, _ALONE = (46, 125, 50), (189, 189, 189)


def draw_neighbours(
    path: Path,
    queries: ImageSet,
    bank: ImageSet,
    chosen: Sequence[int],
    columns: dict[str, np.ndarray],
) -> None:
    """Write a PNG: one row to a query, then its neighbours under each of two representations.

    A neighbour that both representations found has a green frame.

    Args:
        chosen: numbers of the queries.
        columns: title -> [len(chosen), k] numbers of neighbours in ``bank``, nearest first; two of them.
    """
    k = next(iter(columns.values())).shape[1]
    step = _TILE + _GAP
    block = k * step + 3 * _GAP
    sheet = Image.new("RGB", (step + 3 * _GAP + len(columns) * block, _HEADER + len(chosen) * step), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    draw.text((_GAP, 5), "query", fill="black", font=font)
    for column, title in enumerate(columns):
        draw.text((step + 3 * _GAP + column * block, 5), title, fill="black", font=font)
    for row, query in enumerate(chosen):
        top = _HEADER + row * step
        sheet.paste(_tile(queries, query), (_GAP, top))
        shared = set.intersection(*(set(neighbours[row].tolist()) for neighbours in columns.values()))
        for column, neighbours in enumerate(columns.values()):
            for rank, index in enumerate(neighbours[row].tolist()):
                left = step + 3 * _GAP + column * block + rank * step
                sheet.paste(_tile(bank, index), (left, top))
                colour, width = (_SHARED, 3) if index in shared else (_ALONE, 1)
                draw.rectangle((left, top, left + _TILE - 1, top + _TILE - 1), outline=colour, width=width)
    with atomic(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def _tile(images: ImageSet, index: int) -> Image.Image:
    image = images.load(index)
    image.thumbnail((_TILE, _TILE))
    return image
