"""Sentence vectors of the lines of a text, to a file or to standard output, in memory that does not grow with the text.

Legend: n lines, D width.
"""

from __future__ import annotations

import io
import itertools
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np

from infoxlm_ds.atomic import new_file
from infoxlm_ds.config import Pooling, UserError
from infoxlm_ds.evaluation.embed import SentenceEmbedder
from infoxlm_ds.evaluation.neighbours import Vectors

CHUNK = 8192  # lines in memory; sorting by length within a chunk leaves little padding
Form = Literal["npy", "parquet"]


class Writer(Protocol):
    """Appends vectors [n, D] of texts."""

    def append(self, texts: list[str], vectors: Vectors) -> None:
        """Add texts and their vectors."""

    def close(self) -> None:
        """Complete the file, which stays open."""


class Npy:
    """One float32 array [n, D]. numpy leaves room in the header for a larger n, which `close` writes."""

    def __init__(self, file: BinaryIO, width: int) -> None:
        self._file, self._shape = file, (0, width)
        self._header()

    def append(self, texts: list[str], vectors: Vectors) -> None:
        self._file.write(np.ascontiguousarray(vectors, dtype="<f4").data)
        self._shape = (self._shape[0] + len(vectors), self._shape[1])

    def close(self) -> None:
        self._file.seek(0)
        self._header()

    def _header(self) -> None:
        described = {"descr": "<f4", "fortran_order": False, "shape": self._shape}
        np.lib.format.write_array_header_1_0(self._file, described)


class Parquet:
    """The columns `text` and `vector`, a fixed-size list of D float32."""

    def __init__(self, file: BinaryIO, width: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._pa, self._width = pa, width
        self._schema = pa.schema([("text", pa.string()), ("vector", pa.list_(pa.float32(), width))])
        self._writer = pq.ParquetWriter(file, self._schema)

    def append(self, texts: list[str], vectors: Vectors) -> None:
        flat = self._pa.array(np.ascontiguousarray(vectors).ravel())
        columns = [self._pa.array(texts), self._pa.FixedSizeListArray.from_arrays(flat, self._width)]
        self._writer.write_table(self._pa.table(columns, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


WRITERS: dict[Form, Callable[[BinaryIO, int], Writer]] = {"npy": Npy, "parquet": Parquet}


def embed_lines(
    model: Path,
    text: Path | None,
    out: Path | None,
    form: Form,
    *,
    layer: int | None = None,
    pooling: Pooling | None = None,
    device: str | None = None,
) -> None:
    """Write one vector for each line of `text` (None: standard input) to `out` (None: standard output), in order.

    An empty line keeps its place and gets the vector of the empty text. Nothing is written before all lines were
    embedded. UserError if a line is not UTF-8, if standard output is a terminal, if a package is missing, or as in
    `SentenceEmbedder`.
    """
    if out is None and sys.stdout.isatty():
        raise UserError("vectors are not text: write them to a file with --out FILE or > FILE")
    if form == "parquet" and find_spec("pyarrow") is None:
        raise UserError("--format parquet needs pyarrow: pip install 'infoxlm-ds[parquet]'")
    with _input(text) as lines, _output(out) as file:
        embedder = SentenceEmbedder(model, layer, pooling, device)
        writer, count = WRITERS[form](file, embedder.width), 0
        decoded = _decoded(lines, str(text or "standard input"))
        while chunk := list(itertools.islice(decoded, CHUNK)):
            count += len(chunk)
            vectors = embedder.embed(chunk, description=f"lines up to {count:,}")
            writer.append(chunk, vectors[0])
        writer.close()
    how = f"layer {embedder.views[0].layer}, {embedder.views[0].pooling} pooling{', projection' * embedder.projected}"
    print(f"{count:,} vectors of width {embedder.width}: {how}", file=sys.stderr)


@contextmanager
def _input(text: Path | None) -> Iterator[BinaryIO]:
    if text is None:
        if sys.stdin.isatty():
            print("reading lines from the terminal, up to ^D", file=sys.stderr)
        yield sys.stdin.buffer
        return
    if not text.is_file():
        raise UserError(f"{text}: no such file of text")
    with text.open("rb") as file:
        yield file


@contextmanager
def _output(out: Path | None) -> Iterator[BinaryIO]:
    """A file to write and seek in. At the end of the block it is `out`, or goes to standard output."""
    if out is None:
        with tempfile.TemporaryFile() as spool:
            yield spool
            spool.seek(0)
            shutil.copyfileobj(spool, sys.stdout.buffer, io.DEFAULT_BUFFER_SIZE * 16)
            sys.stdout.buffer.flush()
        return
    with new_file(out) as file:
        yield file


def _decoded(lines: Any, name: str) -> Iterator[str]:
    """Lines without their ends. UserError with the number of a line that is not UTF-8."""
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{name}, line {number}: not UTF-8 ({error.reason}): convert it with iconv") from None
        yield text.removesuffix("\n").removesuffix("\r")
