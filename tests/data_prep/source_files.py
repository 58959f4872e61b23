"""Small files of each format, and what stands in them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from data_prep.description import SourceDescription
from data_prep.rows import Item
from data_prep.sources import READERS

PAIRS = [("one", "eins"), ("two lamps", "zwei Lampen"), ("Küche\u2028here", "厨房"), ("4", "vier")]

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": lambda data: bz2.compress(data, 1),  # small blocks
    ".zst": zstandard.ZstdCompressor().compress,
}


def source(form: str, kind: str, **keys: Any) -> SourceDescription:
    return SourceDescription(name=f"{kind}.x", kind=kind, format=form, **keys)  # type: ignore[arg-type]


def read(one: SourceDescription, base: Path, size: int = 10**9) -> list[Item]:
    reader = READERS[one.format]
    return [item for block in reader.blocks(one, base, size) for item in reader.read(one, block)]


def jsonl(folder: Path) -> SourceDescription:
    rows = ({"key": "k", "text": {"en": en, "de": de}, "negatives": {"de": ["falsch"]}} for en, de in PAIRS)
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return source("jsonl", "nway", path="a.jsonl")


def mono_jsonl(folder: Path) -> SourceDescription:
    rows: list[dict[str, Any]] = [{"text": "one\n\ntwo", "language": "en"}, {"text": ["moja", " ", "mbili"]}]
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return source("jsonl", "mono", path="m.jsonl", languages=("sw",))


def text(folder: Path) -> SourceDescription:
    (folder / "a.txt").write_bytes("\ufeffone\ntwo\r\n\n \u3000\nthree\u2028four\n\t\r\nfive\nsix".encode())
    return source("text", "mono", path="a.txt", languages=("en",))


def tsv(folder: Path) -> SourceDescription:
    (folder / "a.tsv").write_bytes("".join(f"{en}\t{de}\r\n" for en, de in PAIRS).encode())
    return source("tsv", "para", path="a.tsv", languages=("en", "de"))


def moses(folder: Path) -> SourceDescription:
    (folder / "a.en").write_bytes("\n".join(en for en, _ in PAIRS).encode())
    (folder / "a.de").write_bytes("\ufeff".encode() + "".join(f"{de}\r\n" for _, de in PAIRS).encode())
    return source("moses", "para", paths={"en": "a.en", "de": "a.de"})


def opus(folder: Path) -> SourceDescription:
    with zipfile.ZipFile(folder / "de-en.txt.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("README", "about")
        archive.writestr("Books.de-en.en", "".join(f"{en}\n" for en, _ in PAIRS))
        archive.writestr("Books.de-en.de", "".join(f"{de}\n" for _, de in PAIRS))
        archive.writestr("Books.de-en.xml", "<links/>")
    return source("opus", "para", path="*.zip")


def tmx(folder: Path) -> SourceDescription:
    units = "".join(
        f'<tu><tuv xml:lang="en"><seg>{en}</seg></tuv><tuv xml:lang="de"><seg>{de}</seg></tuv></tu>\n'
        for en, de in PAIRS
    )
    head = '<?xml version="1.0"?>\n<!DOCTYPE tmx SYSTEM "tmx14.dtd">\n<tmx version="1.4"><header/><body>'
    (folder / "a.tmx").write_bytes(f"{head}{units}</body></tmx>\n".encode())
    return source("tmx", "para", path="a.tmx")


PO_HEAD = 'msgid ""\nmsgstr ""\n"Content-Type: text/plain; charset=UTF-8\\n"\n\n'


def po(folder: Path) -> SourceDescription:
    (folder / "po").mkdir(exist_ok=True)
    german = "".join(f'msgid "{en}"\nmsgstr "{de}"\n\n' for en, de in PAIRS)
    (folder / "po" / "de.po").write_text(PO_HEAD + german, encoding="utf-8")
    return source("gettext", "nway", path="po/{language}.po", languages=("en",))


def mo(folder: Path) -> SourceDescription:
    """The form is described in the manual of gettext, "The Format of GNU MO Files"."""
    entries = sorted([("", "Content-Type: text/plain; charset=UTF-8\n"), *PAIRS])
    keys = [key.encode() for key, _ in entries]
    values = [value.encode() for _, value in entries]
    tables, data, at = [], b"", 28 + 16 * len(entries)
    for cell in keys + values:
        tables.append(struct.pack("<II", len(cell), at + len(data)))
        data += cell + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(entries), 28, 28 + 8 * len(entries), 0, at)
    (folder / "de.mo").write_bytes(head + b"".join(tables) + data)
    return source("gettext", "para", paths={"de": "de.mo"}, languages=("en",))


def parquet(folder: Path) -> SourceDescription:
    """Its package is an extra: a test that calls this is skipped without it."""
    pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"en": [en for en, _ in PAIRS], "de": [de for _, de in PAIRS]})
    writer.write_table(table, folder / "a.parquet", row_group_size=2)
    return source("parquet", "para", path="a.parquet", languages=("en", "de"))


SMALL: dict[str, Callable[[Path], SourceDescription]] = {
    one.__name__: one for one in (jsonl, mono_jsonl, text, tsv, moses, opus, tmx, po, mo, parquet)
}
