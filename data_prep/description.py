"""The description of a corpus, CORPUS.yaml: its texts, languages and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from infoxlm_ds.config import Section, check, read_yaml

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # corpus, sources and languages: they become names of folders
Name = Annotated[str, Field(pattern=NAME)]
KEYS = {"jsonl": ("path",), "text": ("path", "languages"), "moses": ("paths",), "tsv": ("path", "languages")}


class TokenizerDescription(Section):
    """Set `path` to reuse a tokenizer (a Hugging Face folder or a name on its hub), or `vocab_size` to train a unigram
    model with so many pieces in all."""

    path: str | None = None
    vocab_size: int | None = Field(default=None, gt=5)
    character_coverage: float = Field(default=0.9995, gt=0, le=1)
    sentences: int = Field(default=1_000_000, gt=0)  # the model is trained on at most so many, drawn by key

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.path is None) == (self.vocab_size is None):
            raise ValueError("set either path (reuse a tokenizer) or vocab_size (train one)")
        return self


class SourceDescription(Section):
    """One source of texts. `format` decides which of `path`, `paths` and `languages` it needs, see
    data_prep/sources."""

    name: Name
    kind: Literal["mono", "para", "nway"]  # nway: a row holds the same sentence in more than two languages
    format: Literal["jsonl", "text", "moses", "tsv"]
    path: Path | None = None
    paths: dict[str, Path] = Field(default_factory=dict)
    languages: tuple[str, ...] = ()
    mono: bool = False  # each side of each row also becomes monolingual text, mono.<language>

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if not self.name.startswith(f"{self.kind}."):
            raise ValueError(f"source {self.name}: the name of a {self.kind} source must start with {self.kind}.")
        for key in ("path", "paths", "languages"):
            if bool(getattr(self, key)) != (key in KEYS[self.format]):
                verb = "does not use" if getattr(self, key) else "needs"
                raise ValueError(f"source {self.name}: format {self.format} {verb} {key}")
        if (self.kind == "mono") != (self.format == "text"):
            raise ValueError(f"source {self.name}: format text is for kind mono, the others are for para and nway")
        if self.mono and self.kind == "mono":
            raise ValueError(f"source {self.name}: kind mono does not use mono")
        if self.format == "text" and len(self.languages) != 1:
            raise ValueError(f"source {self.name}: monolingual text has one language")
        if self.kind == "para" and self.format != "jsonl" and len(self.paths or self.languages) != 2:
            raise ValueError(f"source {self.name}: kind para has two languages")
        return self


class CorpusDescription(Section):
    name: Name
    max_tokens: int = Field(default=128, gt=1, lt=65536)  # longest side, in pieces
    seed: int = 1
    languages: tuple[str, ...] = ()  # keep only these; empty: all
    rename: dict[str, str] = Field(default_factory=dict)  # language codes of the data to codes of the corpus
    tokenizer: TokenizerDescription
    sources: tuple[SourceDescription, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
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
