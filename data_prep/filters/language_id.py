"""The filter of texts in another language than they should be. It needs the extra `language-id`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data_prep.filters.languages import are_near, base
from data_prep.filters.settings import LanguageId
from infoxlm_ds.config import UserError

Identify = Callable[[str], tuple[str, float]]  # the language of a text, and the confidence
MISSING = "filters.language_id needs {}: pip install 'infoxlm-ds[language-id]'"


class LanguageFilter:
    """Says whether a text is in another language. UserError if the library or the model is missing."""

    def __init__(self, settings: LanguageId, folder: Path) -> None:
        self._settings = settings
        if settings.model is None:
            self._identify, self._known = _py3langid()
        else:
            self._identify, self._known = _fasttext(folder / settings.model)

    def is_of_another_language(self, text: str, language: str) -> bool:
        """False for a language that the identifier does not know, or for too few letters."""
        if base(language) not in self._known or len(text) < self._settings.from_letters:
            return False
        if sum(map(str.isalpha, text)) < self._settings.from_letters:
            return False
        found, confidence = self._identify(text)
        return confidence >= self._settings.confidence and not are_near(found, language)


def _py3langid() -> tuple[Identify, frozenset[str]]:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ModuleNotFoundError:
        raise UserError(MISSING.format("py3langid")) from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return identifier.classify, frozenset(map(base, identifier.labels))


def _fasttext(model: Path) -> tuple[Identify, frozenset[str]]:
    try:
        import fasttext
    except ModuleNotFoundError:
        raise UserError(MISSING.format("fasttext-predict")) from None
    try:
        identifier = fasttext.load_model(str(model))
    except ValueError as error:
        raise UserError(f"filters.language_id: {error}: give a .bin or .ftz file of fastText") from None

    def identify(text: str) -> tuple[str, float]:
        labels, confidences = identifier.predict(text)
        return labels[0].removeprefix("__label__"), float(confidences[0])

    labels, _ = identifier.predict("", k=-1, threshold=-1.0)  # all labels
    return identify, frozenset(base(label.removeprefix("__label__")) for label in labels)
