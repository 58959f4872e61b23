"""What a build reads: the blocks of all files, and the hashes of the files."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from data_prep.description import CorpusDescription
from data_prep.rows import Block
from data_prep.sources import READERS
from data_prep.sources.files import is_compressed, raw, size_of
from infoxlm_ds.config import UserError

LARGEST_BLOCK, SMALLEST_BLOCK, BLOCKS = 8 * 2**20, 2**20, 32  # bytes; how many there are of small inputs
EXPANSION = 6  # of compressed text, about


class Input(NamedTuple):
    """A block of a source, and how many bytes of its file it stands for."""

    source: int
    block: Block
    bytes: int


def read_inputs(description: CorpusDescription, base: Path) -> list[Input]:
    """All blocks, in the order of sources and files. How files are cut depends on their sizes alone."""
    sources = [list(READERS[s.format].blocks(s, base, LARGEST_BLOCK)) for s in description.sources]
    files = {part.file for blocks in sources for block in blocks for part in block.parts}
    sizes = {file: size_of(file) for file in files}
    size = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, sum(sizes.values()) // BLOCKS))
    if size < LARGEST_BLOCK:
        sources = [list(READERS[s.format].blocks(s, base, size)) for s in description.sources]
    inputs: list[Input] = []
    for number, blocks in enumerate(sources):
        of_file = Counter(part.file for block in blocks for part in block.parts)
        for block in blocks:
            share = sum(sizes[part.file] // of_file[part.file] for part in block.parts)
            inputs.append(Input(number, block, share))
    if not inputs:
        raise UserError("the files of all sources are empty: correct the paths in the corpus description")
    return inputs


def hashes_of(description: CorpusDescription, base: Path, inputs: list[Input]) -> dict[str, str]:
    """The sha256 of every input file, by path. UserError if one is missing."""
    paths = [*dict.fromkeys(part.file for one in inputs for part in one.block.parts), *also_read(description, base)]
    try:
        return {stated(path, base): _sha256(path) for path in paths}
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}: correct the path in the corpus description") from None


def also_read(description: CorpusDescription, base: Path) -> list[str]:
    """The files of the tokenizer and of the filters. A copy of a name on the hub has its hashes in the manifest."""
    held_out, identifier = description.filters.held_out, description.filters.language_id
    paths = [*held_out.files] if held_out else []
    paths += [identifier.model] if identifier and identifier.model else []
    folder = base / (description.tokenizer.path or "")
    kinds = (".json", ".model", ".txt", ".vocab")
    tokenizer = sorted(path for path in folder.glob("*") if path.suffix in kinds) if description.tokenizer.path else []
    return [str(base / path) for path in (*paths, *tokenizer)]


def _sha256(file: str) -> str:
    digest = hashlib.sha256()
    with raw(file) as opened:
        while chunk := opened.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def stated(file: str, base: Path) -> str:
    """A file as the manifest names it."""
    return file if "://" in file else os.path.relpath(file, base)


def is_dense(file: str) -> bool:
    """Whether a file holds more text than it has bytes."""
    return is_compressed(file) or file.endswith((".parquet", ".zip"))


def expansion(file: str) -> int:
    """About how many bytes of text a byte of a file stands for."""
    return EXPANSION if is_dense(file) else 1
