"""Measures of a trained encoder. Nothing here needs the trainer."""

from typing import Literal

Pooling = Literal["mean", "cls"]
