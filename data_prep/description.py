"""The description of a corpus, CORPUS.yaml: its texts, languages and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from data_prep.clean import Form
from data_prep.filters.settings import FilterSettings
from infoxlm_ds.config import Fraction, Positive, Section
from infoxlm_ds.reading import check, read_yaml

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # corpus, sources and languages: they become names of folders
Name = Annotated[str, Field(pattern=NAME)]


class Format(NamedTuple):
    """Which kinds of source a format is for, and which keys it has. `needs`: one key of each group."""

    kinds: tuple[str, ...]
    needs: tuple[tuple[str, ...], ...]
    allows: tuple[str, ...] = ()


PARALLEL, ALL = ("para", "nway"), ("mono", "para", "nway")
FORMATS = {
    "jsonl": Format(ALL, (("path",),), allows=("languages",)),
    "text": Format(("mono",), (("path",), ("languages",)), allows=("documents",)),
    "moses": Format(PARALLEL, (("paths",),)),
    "tsv": Format(PARALLEL, (("path",), ("languages",))),
    "parquet": Format(ALL, (("path",), ("languages", "columns"))),
    "opus": Format(PARALLEL, (("path",),)),
    "tmx": Format(PARALLEL, (("path",),)),
    "gettext": Format(PARALLEL, (("path", "paths"), ("languages",))),
}
KEYS = ("path", "paths", "languages", "columns", "documents")


class TokenizerDescription(Section):
    """Set `path` to reuse a tokenizer (a Hugging Face folder or a name on its hub), or `vocab_size` to train a unigram
    model with so many pieces in all."""

    path: str | None = Field(
        default=None, description="a tokenizer to reuse: a Hugging Face folder or a name on its hub"
    )
    vocab_size: int | None = Field(default=None, gt=5, description="train a model with so many pieces in all")
    character_coverage: float = Field(default=0.9995, gt=0, le=1, description="share of characters that get a piece")
    sentences: Positive = Field(default=1_000_000, description="the model is trained on at most so many, drawn by key")
    alpha: Fraction = Field(
        default=0.5, description="if there are more, a language with the share p of all texts gets one like p^alpha"
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.path is None) == (self.vocab_size is None):
            raise ValueError("set either path (reuse a tokenizer) or vocab_size (train one)")
        return self


class SourceDescription(Section):
    """One source of texts. `format` decides which keys it needs, see FORMATS and data_prep/sources."""

    name: Name = Field(description="starts with the kind and a dot, such as para.books")
    kind: Literal["mono", "para", "nway"] = Field(
        description="mono: monolingual text. para: pairs. nway: the same sentence in more than two languages"
    )
    format: Literal["jsonl", "text", "moses", "tsv", "parquet", "opus", "tmx", "gettext"] = Field(
        description="the form of the files"
    )
    path: str | None = Field(
        default=None,
        description="a file, a pattern such as books/*.txt, a folder (all files in it) or a URL such as s3://bucket/x; "
        "gettext: a pattern with {language} in it",
    )
    paths: dict[str, str] = Field(default_factory=dict, description="the path of each language")
    languages: tuple[str, ...] = Field(
        default=(),
        description="text: the language. tsv: the language of each column. gettext: the language of the msgids. "
        "parquet: the columns; with kind mono, the language. jsonl of kind mono: the language of lines that name none",
    )
    columns: dict[str, str] = Field(default_factory=dict, description="the name of each language's column")
    documents: Literal["blank_line", "line", "file"] | None = Field(
        default=None, description="what ends a document of text: a blank line (if not set), each line, or the file"
    )
    mono: bool = Field(default=False, description="each side of each row also becomes monolingual text")
    license: str | None = Field(default=None, description="of the texts, such as cc-by-4.0; a model card names it")
    homepage: str | None = Field(default=None, description="where the texts come from; a model card names it")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        problem = self._wrong_name() or self._wrong_keys() or self._wrong_languages()
        if problem:
            raise ValueError(f"source {self.name}: {problem}")
        return self

    def _wrong_name(self) -> str:
        if not self.name.startswith(f"{self.kind}."):
            return f"the name of a {self.kind} source must start with {self.kind}."
        kinds = FORMATS[self.format].kinds
        if self.kind not in kinds:
            return f"format {self.format} is for kind {' or '.join(kinds)}"
        return "kind mono does not use mono" if self.mono and self.kind == "mono" else ""

    def _wrong_keys(self) -> str:
        form, given = FORMATS[self.format], [key for key in KEYS if getattr(self, key)]
        for group in form.needs:
            if sum(key in given for key in group) != 1:
                return f"format {self.format} needs {'one of ' * (len(group) > 1)}{' and '.join(group)}"
        known = {*form.allows, *(key for group in form.needs for key in group)}
        unknown = [key for key in given if key not in known]
        if unknown:
            return f"format {self.format} does not use {unknown[0]}"
        if self.format == "gettext" and self.path is not None and "{language}" not in self.path:
            return "the path of format gettext needs {language} in it, such as po/{language}.po"
        return ""

    def _wrong_languages(self) -> str:
        if len(set(self.languages)) != len(self.languages):
            return "languages names a language twice"
        named = self.paths or self.columns or self.languages
        if (self.kind == "mono" and len(named) > 1) or (self.format == "text" and len(named) != 1):
            return "monolingual text has one language"
        if self.kind != "mono" and self.format == "jsonl" and self.languages:
            return f"format jsonl does not use languages with kind {self.kind}"
        if self.format == "gettext" and len(self.languages) != 1:
            return "languages of format gettext is the one language of the msgids"
        if self.kind == "para" and self.format in ("moses", "tsv", "parquet") and len(named) != 2:
            return "kind para has two languages"
        return ""


class CorpusDescription(Section):
    """The whole description."""

    name: Name = Field(description="of the corpus")
    max_tokens: int = Field(
        default=128, gt=1, lt=65536, description="pieces: longer sides are left out, longer monolingual text is split"
    )
    seed: int = Field(default=1, description="of the order of rows, and of the choice of texts for a tokenizer")
    languages: tuple[str, ...] = Field(default=(), description="keep only these; empty: all")
    rename: dict[str, str] = Field(
        default_factory=dict, description="language codes of the data to codes of the corpus"
    )
    normalise: Form = Field(
        default="nfc", description="nfkc also replaces compatible characters, such as full-width letters"
    )
    on_error: Literal["stop", "skip"] = Field(
        default="stop", description="skip: count what cannot be used, such as a damaged line, up to 1 % of all"
    )
    filters: FilterSettings = Field(default=FilterSettings(), description="which texts are left out")
    tokenizer: TokenizerDescription = Field(description="how texts become ids")
    sources: tuple[SourceDescription, ...] = Field(description="the texts")

    @model_validator(mode="after")
    def _sources_differ(self) -> Self:
        if not self.sources:
            raise ValueError("sources: the list is empty: name at least one source of texts")
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError("two sources have the same name")
        return self

    def language(self, code: str) -> str | None:
        """The corpus' code for a language code of the data; None if the language is left out."""
        code = self.rename.get(code, code)
        return code if not self.languages or code in self.languages else None


def load_description(path: Path) -> CorpusDescription:
    """Read and check a description. Its paths are relative to its folder. UserError lists all errors in one line."""
    return check(CorpusDescription, read_yaml(path, "corpus description"), str(path))
