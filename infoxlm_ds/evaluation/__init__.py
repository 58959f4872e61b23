"""Measures of a trained encoder. Nothing here needs the trainer."""
