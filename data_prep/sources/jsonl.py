"""N-way text, the same sentence in several languages: on each line `{"key": ..., "text": {language: sentence}}`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from data_prep.sources import lines
from infoxlm_ds.config import UserError


def read(path: Path) -> Iterator[dict[str, str]]:
    for number, line in lines(path):
        try:
            text = json.loads(line)["text"]
            yield {str(language): sentence for language, sentence in text.items() if sentence.strip()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f'{path} line {number}: expected {{"key": ..., "text": {{language: sentence}}}}') from None
