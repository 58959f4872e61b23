"""Measures of a trained encoder. Nothing here needs the trainer."""

from infoxlm_ds.config import Pooling

__all__ = ["Pooling"]
