"""`manifest.json`, the description of a prepared corpus. It holds hashes of everything else and of itself."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import ValidationError

from infoxlm_ds.config import Place, Section, UserError
from infoxlm_ds.data.files import File
from infoxlm_ds.data.store import open_store

FORMAT = 3
NAME = "manifest.json"


class Shard(File):
    """A tar of packs."""

    packs: int


class Source(Section):
    """`kind`: monolingual text, pairs, or n-way rows, which hold the same sentence in several languages. `languages`:
    the sides of a row, in the order of the packs."""

    name: str
    kind: Literal["mono", "para", "nway"]
    languages: tuple[str, ...]
    items: int
    tokens: int
    packs: int
    index: File
    shards: tuple[Shard, ...]


class Tokenizer(Section):
    """`special_ids`: the ids of bos, pad, eos, unk and mask. bos begins every sequence, and eos ends every text.
    `separators`: the number of eos between two texts: two for XLM-R, one for BERT."""

    name: str
    vocab_size: int
    special_ids: dict[str, int]
    separators: Literal[1, 2] = 2
    files: tuple[File, ...]

    def overhead(self, texts: Literal[1, 2]) -> int:
        """Number of special tokens of a sequence of one text or of two."""
        return 2 if texts == 1 else 2 + self.separators


class Manifest(Section):
    """`max_tokens`: the longest side in pieces, without special tokens. `counts`: how much was split or
    left out, by reason."""

    format: int = FORMAT
    name: str
    max_tokens: int
    tokenizer: Tokenizer
    sources: tuple[Source, ...]
    samples: File | None = None  # texts that were left out, a few for each reason
    counts: dict[str, int]
    prep: dict[str, Any]  # the description the corpus was built from, and hashes of its inputs
    sha256: str = ""

    def render(self) -> str:
        """The text of the file, with the hash of everything except the hash."""
        body = self.model_dump(mode="json") | {"sha256": ""}
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        return json.dumps(body | {"sha256": digest}, indent=1, ensure_ascii=False) + "\n"

    def files(self) -> list[File]:
        """Every file of the corpus except the manifest."""
        of_sources = [file for source in self.sources for file in (source.index, *source.shards)]
        return [*self.tokenizer.files, *of_sources, *([self.samples] if self.samples else [])]


class NoCorpus(UserError):
    """There is no manifest."""


def load_manifest(corpus: Place) -> Manifest:
    """The manifest of a corpus. NoCorpus if there is none, UserError if it has another format, or if a byte of it was
    changed."""
    store = open_store(corpus)
    path, data = store.where(NAME), store.whole(NAME)
    if data is None:
        where = "FOLDER` and upload the folder" if isinstance(corpus, str) else f"{corpus}`"
        raise NoCorpus(f"{corpus} is no prepared corpus: make it with `infoxlm prep build CORPUS.yaml {where}")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: prepare the corpus again") from None
    try:
        tree = json.loads(text)
        if isinstance(tree, dict) and tree.get("format") != FORMAT:
            raise UserError(
                f"{path} has format {tree.get('format')}, this version reads {FORMAT}: prepare the corpus again"
            )
        manifest = Manifest.model_validate(tree)
    except (ValueError, ValidationError):
        raise UserError(f"{path} is damaged: prepare the corpus again") from None
    if manifest.render() != text:
        raise UserError(f"{path} was changed after it was written: prepare the corpus again")
    return manifest
