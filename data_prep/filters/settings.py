"""The key `filters` of CORPUS.yaml. Each filter is described in docs/data.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from infoxlm_ds.config import Fraction, Positive, Section

Action = Literal["keep", "strip", "drop"]


class Repetition(Section):
    """A text goes if one sequence of one to four words is more than `share` of it and stands in it `times` times."""

    share: Fraction = Field(default=0.7, description="of the words; in scripts without spaces, of the characters")
    times: int = Field(default=5, gt=1, le=10**6, description="at least so many")


class Script(Section):
    """A text goes if too many of its letters are of scripts that its language does not use."""

    other: Fraction = Field(default=0.5, description="largest share of letters of other scripts; Latin has its own")
    latin: Fraction = Field(default=0.95, description="largest share of Latin letters where Latin is another script")
    above: int = Field(default=30, ge=0, description="texts with at most so many Latin letters stay: they may be names")


class LengthRatio(Section):
    """A side goes if it or the reference is more than `ratio` times as long as the other."""

    ratio: float = Field(default=5, gt=1, description="in letters; those of Chinese, Japanese and Korean count more")
    above: int = Field(default=60, ge=0, description="pairs whose longer side is not longer than this stay")


class HeldOut(Section):
    """Texts of these files never become training data."""

    files: tuple[Path, ...] = Field(min_length=1, description="n-way JSONL, or one text a line; also .xz")
    share: Fraction = Field(default=0.5, description="a longer text goes if it has more than this share of its n-grams")
    words: int = Field(
        default=8, gt=1, le=100, description="of an n-gram; in scripts without spaces, twice as many characters"
    )
    from_words: int = Field(default=13, gt=1, le=10**6, description="shorter texts go only if they are equal")


class LanguageId(Section):
    """A text goes if its language is confidently identified as another one, which is not a near one."""

    model: Path | None = Field(default=None, description="of fastText; null: py3langid")
    confidence: Fraction = Field(default=0.9, description="of the identifier, at least")
    from_letters: int = Field(default=30, ge=0, description="shorter texts are not identified")


class NearDuplicates(Section):
    """Of rows and blocks that share most of their runs of five pieces, one stays. With the defaults, two of three pairs
    with a Jaccard similarity of .72 are found, and half of those with .68."""

    bands: int = Field(default=14, ge=1, le=100, description="of MinHash: with more, less similar texts are found")
    rows: int = Field(default=8, ge=1, le=100, description="of a band: with more, only more similar texts are found")


class FilterSettings(Section):
    """All filters. null turns a filter off. The order of application is that of data_prep/filters/filters.py."""

    reference: str = Field(default="en", description="the language that the other sides of a row are compared with")
    placeholders: Action = Field(default="keep", description="such as {name} and %s: keep, strip, or drop the text")
    markup: Action = Field(default="keep", description="HTML tags, links of Markdown: keep, strip, or drop the text")
    max_characters: Positive | None = Field(
        default=5000, description="longer sides of rows go; monolingual text is split"
    )
    letters: Fraction | None = Field(default=0.1, description="smallest share of letters among the characters")
    script: Script | None = Field(default=Script(), description="texts in wrong scripts")
    repetition: Repetition | None = Field(default=Repetition(), description="texts that repeat themselves")
    language_id: LanguageId | None = Field(default=None, description="texts in another language")
    held_out: HeldOut | None = Field(default=None, description="texts of development and test sets")
    copied_words: Annotated[int, Field(ge=0)] | None = Field(
        default=2, description="sides equal to the reference with more words than this go; capitalised words are names"
    )
    length_ratio: LengthRatio | None = Field(default=LengthRatio(), description="pairs of very different lengths")
    numbers: bool = Field(default=False, description="drop sides whose digits are not those of the reference")
    urls: bool = Field(default=False, description="drop sides whose URLs are not those of the reference")
    near_duplicates: NearDuplicates | None = Field(
        default=None, description="of rows or blocks that are nearly equal, in the whole source, one stays"
    )
