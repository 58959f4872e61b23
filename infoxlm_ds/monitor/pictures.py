"""Pictures of tables of numbers, for TensorBoard and Weights & Biases. Drawn by Pillow, which TensorBoard brings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]
GAP, SIZE = 8, 13  # pixels: what is left free beside text, and letters
LOW, HIGH = np.array([247, 251, 255.0]), np.array([8, 48, 107.0])  # one hue, from light to dark


def heat_map(
    title: str, values: npt.NDArray[np.floating], rows: Sequence[str], columns: Sequence[str], figures: bool = True
) -> Picture:
    """Cells of `values` [R, C] in shades from 0 to 1, as [height, width, 3]. `figures`: whether cells show their values
    in percent. NaN is grey."""
    from PIL import Image, ImageDraw, ImageFont

    font, cell = ImageFont.load_default(SIZE), 30 if figures else 15
    left, top = GAP + max(_width(font, name) for name in rows) + GAP, 2 * SIZE + GAP
    below = max((_width(font, name) for name in columns), default=0) + 2 * GAP
    size = max(left + cell * len(columns), GAP + _width(font, title)) + GAP, top + cell * len(rows) + below
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    draw.text((GAP, GAP), title, "black", font)
    for row, column in np.ndindex(values.shape):
        x, y, value = left + cell * column, top + cell * row, float(values[row, column])
        draw.rectangle((x, y, x + cell - 1, y + cell - 1), _shade(value))
        if figures and np.isfinite(value):
            ink = "white" if value > 0.5 else "black"
            draw.text((x + cell / 2, y + cell / 2), f"{100 * value:.0f}", ink, font, anchor="mm")
    for number, name in enumerate(rows):
        draw.text((left - GAP, top + cell * (number + 0.5)), name, "black", font, anchor="rm")
    for number, name in enumerate(columns):
        label = Image.new("RGB", (below, SIZE + 4), "white")
        ImageDraw.Draw(label).text((below - GAP, SIZE / 2 + 2), name, "black", font, anchor="rm")
        place = round(left + cell * (number + 0.5) - SIZE / 2 - 2), top + cell * len(rows)
        image.paste(label.rotate(90, expand=True), place)
    return np.asarray(image, np.uint8)


def _width(font: object, text: str) -> int:
    return round(font.getlength(text))  # type: ignore[attr-defined]


def _shade(value: float) -> tuple[int, ...]:
    if not np.isfinite(value):
        return (200, 200, 200)
    share = min(max(value, 0.0), 1.0)
    return tuple(np.round(LOW + share * (HIGH - LOW)).astype(int).tolist())
