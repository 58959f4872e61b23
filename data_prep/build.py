"""Turns raw text into a corpus folder: reads, cleans and tokenises (map), then drops duplicates, shuffles and writes
packs (reduce).

Legend: n rows, s sides of a row, T ids. The same description and inputs always give the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

from data_prep.clean import clean
from data_prep.description import NAME, CorpusDescription, SourceDescription, load_description
from data_prep.rows import Document, Fault, Notice, Row
from data_prep.sources import READERS
from data_prep.sources.files import raw
from data_prep.tokenizer import describe_tokenizer, load_fast, make_tokenizer
from infoxlm_ds.atomic import new_folder
from infoxlm_ds.config import UserError
from infoxlm_ds.data import manifest as manifests
from infoxlm_ds.data.manifest import File, Manifest, Shard, Source, load_manifest, sha256_of
from infoxlm_ds.data.packs import ROWS, Pack, content_id, text_id, write_source

CHUNK = 20_000  # texts tokenised in one call
BLOCK = 2**26  # bytes


class Texts(NamedTuple):
    """All texts of a source: `rows` with s sides each; a missing side is ""."""

    name: str
    kind: str
    languages: tuple[str, ...]
    rows: list[tuple[str, ...]]


class Pieces(NamedTuple):
    """A tokenizer and the id of its unknown piece."""

    fast: Tokenizer
    unk: int


@dataclass
class Table:
    """Tokenised rows: `ids` uint32 [T], row after row; `lengths` [n, s]; `text_ids` [n, s]."""

    ids: np.ndarray
    lengths: np.ndarray
    text_ids: np.ndarray

    def packs(self, order: np.ndarray) -> Iterator[Pack]:
        """The rows in the given order, as packs of 512 rows."""
        ends = np.cumsum(self.lengths.sum(1))
        for start in range(0, len(order), ROWS):
            rows = order[start : start + ROWS]
            lengths = self.lengths[rows].T
            ids = np.concatenate([self.ids[ends[r] - self.lengths[r].sum() : ends[r]] for r in rows])
            yield Pack(ids, np.ascontiguousarray(lengths, np.uint16), np.ascontiguousarray(self.text_ids[rows].T))


def build(description_path: Path, out: Path) -> None:
    """Prepare the corpus of a description in the new folder `out`. If it exists already, do nothing.

    The folder gets its name after all files are written. UserError if the description is wrong, an input cannot be
    read, or `out` holds something else.
    """
    description = load_description(description_path)
    base, console = description_path.parent, Console(stderr=True, soft_wrap=True)
    prep = {"description": description.model_dump(mode="json"), "inputs": _hash_inputs(description, base)}
    if out.exists():
        if not (out / manifests.NAME).is_file():
            raise UserError(f"{out} exists and holds no corpus: remove it or choose another folder")
        if load_manifest(out).prep != prep:
            raise UserError(
                f"{out} holds the corpus of another description or other inputs: remove it or choose another folder"
            )
        console.print(f"{out}: prepared already", highlight=False)
        return
    with new_folder(out) as folder:
        _write(description, base, prep, folder, console)
    console.print(f"{out}: done", highlight=False)


def _write(description: CorpusDescription, base: Path, prep: dict[str, Any], out: Path, console: Console) -> None:
    counts: Counter[str] = Counter()
    console.print("reading", highlight=False)
    parallel = [
        _read_parallel(source, description, base, counts) for source in description.sources if source.kind != "mono"
    ]
    documents = _read_documents(description, base, parallel)
    console.print("making the tokenizer", highlight=False)
    every_side = itertools.chain(
        (side for texts in parallel for row in texts.rows for side in row if side),
        (sentence for of_language in documents.values() for document in of_language for sentence in document),
    )
    make_tokenizer(description.tokenizer, base, every_side, description.seed, out / "tokenizer")
    files = tuple(_file(out, path) for path in sorted((out / "tokenizer").iterdir()))
    described = describe_tokenizer(out / "tokenizer", files)
    tokenizer = Pieces(load_fast(out / "tokenizer"), described.special_ids["unk"])
    sources = []
    for texts in parallel:
        console.print(f"tokenising {texts.name}: {len(texts.rows):,} rows", highlight=False)
        table = _parallel_table(texts, tokenizer, description.max_tokens, counts)
        if len(table.lengths):
            sources.append(_write_source(out, texts, table, description))
    for language, of_language in sorted(documents.items()):
        name = f"mono.{language}"
        console.print(f"tokenising {name}: {len(of_language):,} documents", highlight=False)
        table = _mono_table(of_language, tokenizer, description.max_tokens, counts)
        if len(table.lengths):
            sources.append(_write_source(out, Texts(name, "mono", (language,), []), table, description))
    manifest = Manifest(
        name=description.name,
        max_tokens=description.max_tokens,
        tokenizer=described,
        sources=tuple(sources),
        counts=dict(sorted(counts.items())),
        prep=prep,
    )
    if not manifest.sources:
        raise UserError("no row is left after cleaning: check the sources and languages of the description")
    (out / manifests.NAME).write_text(manifest.render(), encoding="utf-8")


def _read_parallel(
    source: SourceDescription, description: CorpusDescription, base: Path, counts: Counter[str]
) -> Texts:
    kept: list[dict[str, str]] = []
    for row in _read(source, base):
        assert isinstance(row, Row)
        kept.append({})
        for code, side in row.texts.items():
            language, cleaned = description.language(code), clean(side)
            if language is None or not cleaned:
                continue
            if language in kept[-1]:
                counts["sides_of_a_language_the_row_has"] += 1  # two codes were renamed to one
            kept[-1].setdefault(language, cleaned)
    languages = tuple(sorted({language for row in kept for language in row}))
    for language in languages:
        _check_code(source, language)
    if source.kind == "para" and len(languages) > 2:
        raise UserError(
            f"source {source.name}: kind para has two languages, but the data has {len(languages)}: use kind nway"
        )
    return Texts(source.name, source.kind, languages, [tuple(row.get(x, "") for x in languages) for row in kept])


def _read(source: SourceDescription, base: Path) -> Iterator[Row | Document]:
    """All of a source. UserError at the first fault."""
    reader = READERS[source.format]
    for block in reader.blocks(source, base, BLOCK):
        for item in reader.read(source, block):
            if isinstance(item, Fault):
                raise UserError(f"{item.place}: {item.what}: correct the file")
            if isinstance(item, Notice):
                Console(stderr=True, soft_wrap=True).print(f"{item.place}: {item.what}", highlight=False, markup=False)
            else:
                yield item


def _check_code(source: SourceDescription, language: str) -> None:
    if not re.fullmatch(NAME, language):
        raise UserError(f"source {source.name}: {language!r} cannot be a language code: give it another one in rename")


def _read_documents(description: CorpusDescription, base: Path, parallel: list[Texts]) -> dict[str, list[list[str]]]:
    """Monolingual documents by language, from text files and from parallel sources with `mono`. Of a parallel source,
    each different side is a document."""
    documents: dict[str, list[list[str]]] = {}
    by_name = {texts.name: texts for texts in parallel}
    for source in description.sources:
        if source.kind == "mono":
            for document in _read(source, base):
                assert isinstance(document, Document)
                language = description.language(document.language)
                cleaned = [sentence for sentence in map(clean, document.sentences) if sentence]
                if language is not None and cleaned:
                    _check_code(source, language)
                    documents.setdefault(language, []).append(cleaned)
        elif source.mono:
            texts = by_name[source.name]
            for column, language in enumerate(texts.languages):
                sides = dict.fromkeys(row[column] for row in texts.rows if row[column])
                documents.setdefault(language, []).extend([side] for side in sides)
    return documents


def _parallel_table(texts: Texts, tokenizer: Pieces, longest: int, counts: Counter[str]) -> Table:
    """The rows that have at least two sides of at most `longest` pieces, without duplicates."""
    sides = len(texts.languages)
    flat = _tokenise([side for row in texts.rows for side in row], tokenizer, counts)
    shape = len(texts.rows), sides
    lengths = np.array([len(ids) for ids in flat], np.int64).reshape(shape)
    text_ids = np.array([text_id(side) if side else 0 for row in texts.rows for side in row], np.uint64).reshape(shape)
    too_long = lengths > longest
    counts["sides_too_long"] += int(too_long.sum())
    lengths[too_long], text_ids[too_long] = 0, 0
    (enough,) = np.nonzero((lengths > 0).sum(1) >= 2)
    counts["rows_with_less_than_two_sides"] += len(lengths) - len(enough)
    different = np.unique(text_ids[enough], axis=0, return_index=True)[1] if len(enough) else enough
    counts["duplicate_rows"] += len(enough) - len(different)
    kept = enough[np.sort(different)]
    ids = [flat[row * sides + side] for row in kept for side in range(sides) if lengths[row, side]]
    return Table(_flat(ids), lengths[kept], text_ids[kept])


def _mono_table(documents: list[list[str]], tokenizer: Pieces, longest: int, counts: Counter[str]) -> Table:
    """Blocks of at most `longest` pieces, without duplicates. A block holds whole consecutive sentences of one
    document; a longer sentence is split."""
    tokenised = iter(_tokenise([sentence for document in documents for sentence in document], tokenizer, counts))
    blocks: list[np.ndarray] = []
    for document in documents:
        block: list[np.ndarray] = []
        for ids in itertools.islice(tokenised, len(document)):
            pieces = [ids[start : start + longest] for start in range(0, len(ids), longest)]
            counts["sentences_split"] += len(pieces) > 1
            for piece in pieces:
                if block and sum(map(len, block)) + len(piece) > longest:
                    blocks.append(np.concatenate(block))
                    block = []
                block.append(piece)
        if block:
            blocks.append(np.concatenate(block))
    different = list({block.tobytes(): block for block in blocks}.values())
    counts["duplicate_blocks"] += len(blocks) - len(different)
    names = np.array([content_id(block.tobytes()) for block in different], np.uint64)
    lengths = np.array([len(block) for block in different], np.int64)
    return Table(_flat(different), lengths.reshape(-1, 1), names.reshape(-1, 1))


def _write_source(out: Path, texts: Texts, table: Table, description: CorpusDescription) -> Source:
    # Sorting by a keyed hash of the row's texts shuffles the rows independently of the input's order.
    key = hashlib.blake2b(f"{description.seed}/{texts.name}".encode(), digest_size=16).digest()
    hashes = [hashlib.blake2b(row.tobytes(), digest_size=8, key=key).digest() for row in table.text_ids]
    order = np.array(sorted(range(len(hashes)), key=hashes.__getitem__), np.int64)
    shards, index = write_source(out / texts.name, texts.name, table.packs(order))
    index_path = out / texts.name / f"{texts.name}.index.npy"
    np.save(index_path, index)
    return Source(
        name=texts.name,
        kind=texts.kind,  # type: ignore[arg-type]
        languages=texts.languages,
        items=len(order),
        tokens=int(table.lengths.sum()),
        packs=len(index),
        index=_file(out, index_path),
        shards=tuple(Shard(packs=shard.packs, **_file(out, shard.path).model_dump()) for shard in shards),
    )


def _tokenise(texts: list[str], tokenizer: Pieces, counts: Counter[str]) -> list[np.ndarray]:
    """The ids of each text. If a text spells a special token, such as <mask>, it becomes <unk>: it is only text."""
    added = tokenizer.fast.get_added_tokens_decoder()
    special = [number for number, token in added.items() if token.special and number != tokenizer.unk]
    out: list[np.ndarray] = []
    for start in range(0, len(texts), CHUNK):
        encoded = tokenizer.fast.encode_batch_fast(texts[start : start + CHUNK], add_special_tokens=False)
        ids = np.array([number for encoding in encoded for number in encoding.ids], np.uint32)
        spelled = np.isin(ids, special)
        ids[spelled] = tokenizer.unk
        counts["special_tokens_in_text"] += int(spelled.sum())
        out += np.split(ids, np.cumsum([len(encoding) for encoding in encoded])[:-1])
    return out


def _flat(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.uint32), *parts])


def _hash_inputs(description: CorpusDescription, base: Path) -> dict[str, str]:
    """The sha256 of every input file, by path. UserError if one is missing."""
    folder = description.tokenizer.path
    blocks = (READERS[source.format].blocks(source, base, BLOCK) for source in description.sources)
    paths = dict.fromkeys(part.file for block in itertools.chain.from_iterable(blocks) for part in block.parts)
    if folder is not None:  # for a name on the hub, the manifest has the hashes of the copy
        paths |= dict.fromkeys(str(base / folder / path.name) for path in sorted((base / folder).glob("*token*")))
    try:
        return {path if "://" in path else os.path.relpath(path, base): _sha256(path) for path in paths}
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}: correct the path in the corpus description") from None


def _sha256(file: str) -> str:
    digest = hashlib.sha256()
    with raw(file) as opened:
        while chunk := opened.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _file(out: Path, path: Path) -> File:
    return File(name=str(path.relative_to(out)), bytes=path.stat().st_size, sha256=sha256_of(path))
