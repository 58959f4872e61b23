"""Damaged source files of each format are read, with faults, or refused by one line."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.description import FORMATS, SourceDescription
from data_prep.rows import Document, Fault, Notice, Row
from data_prep.sources import files
from infoxlm_ds.config import UserError
from infoxlm_ds.reading import check
from tests.data_prep.source_files import COMPRESS, SMALL, read
from tests.fuzz.test_fuzz import Fuzz, fuzz  # noqa: F401 - a fixture

places = st.floats(0, 1, exclude_max=True)
damages = st.lists(
    st.tuples(st.sampled_from(["set", "cut", "insert", "double", "remove"]), places, st.binary(min_size=1, max_size=5)),
    min_size=1,
    max_size=4,
)


def _harmed(data: bytes, damage: list[tuple[str, float, bytes]]) -> bytes:
    for how, place, new in damage:
        at = int(place * len(data))
        if how == "set":
            data = data[:at] + new + data[at + len(new) :]
        elif how == "cut":
            data = data[:at]
        elif how == "insert":
            data = data[:at] + new + data[at:]
        elif how == "double":
            data = data[:at] + data[at // 2 :]
        else:
            data = data[:at] + data[at + new[0] :]
    return data


@pytest.mark.parametrize("suffix", ["", *COMPRESS])
@pytest.mark.parametrize("name", SMALL)
def test_no_damage_to_a_source_ends_in_a_traceback(tmp_path: Path, fuzz: Fuzz, name: str, suffix: str) -> None:  # noqa: F811
    one = SMALL[name](tmp_path)
    stored = [path for path in tmp_path.rglob("*") if path.is_file()]
    if suffix:
        if one.format in ("opus", "gettext", "parquet"):
            pytest.skip("has a form of its own")
        for path in stored:
            (path.parent / f"{path.name}{suffix}").write_bytes(COMPRESS[suffix](path.read_bytes()))
            path.unlink()
        paths = {code: f"{path}{suffix}" for code, path in one.paths.items()}
        one = one.model_copy(update={"path": one.path and f"{one.path}{suffix}", "paths": paths})
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    @fuzz(25)
    @given(st.sampled_from(sorted(whole)), damages, st.sampled_from([1, 7, 10**9]))
    def run(path: Path, damage: list[tuple[str, float, bytes]], size: int) -> None:
        path.write_bytes(_harmed(whole[path], damage))
        try:
            for item in read(one, tmp_path, size):
                assert isinstance(item, Row | Document | Fault | Notice)
                assert not isinstance(item, Fault) or item.what
                for text in item.texts.values() if isinstance(item, Row) else ():
                    assert text.strip() and "\0" not in text and text.encode()
        except UserError as error:
            assert "\n" not in str(error) and 0 < len(str(error)) < 3000
        finally:
            path.write_bytes(whole[path])

    run()


PATHS = ["", ".", "*", "**", "a.txt", "a.tsv", "*.zip", "po/{language}.po", "{language}", "a.{language}", "a.tmx"]
PATHS += ["/", "[", "x" * 300, "\0", "\ud800", "~", "://", "file:///dev/null", "memory://x", "zip://*::a.tmx"]
codes = st.sampled_from(["en", "de", "", "\n", "../x"])
keys: dict[str, st.SearchStrategy[Any]] = {
    "path": st.sampled_from(PATHS),
    "paths": st.dictionaries(codes, st.sampled_from(PATHS), max_size=3),
    "languages": st.lists(codes, max_size=3),
    "columns": st.dictionaries(codes, codes, max_size=3),
    "documents": st.sampled_from(["line", "file", "blank_line", "page"]),
}


@pytest.mark.parametrize("form", FORMATS)
def test_no_description_of_a_source_ends_in_a_traceback(tmp_path: Path, fuzz: Fuzz, form: str) -> None:  # noqa: F811
    for name, write in SMALL.items():
        if name != "parquet":
            write(tmp_path)
    groups = FORMATS[form].needs
    needed = {group[0]: keys[group[0]] for group in groups if len(group) == 1}
    optional = {key: keys[key] for group in groups for key in group if len(group) > 1}
    optional |= {key: keys[key] for key in FORMATS[form].allows}
    descriptions = st.fixed_dictionaries(needed, optional=optional)

    @fuzz(50)
    @given(st.sampled_from(FORMATS[form].kinds), descriptions, st.sampled_from([1, 10**9]))
    def run(kind: str, given_keys: dict[str, Any], size: int) -> None:
        try:
            one = check(SourceDescription, {"name": f"{kind}.x", "kind": kind, "format": form} | given_keys, "c.yaml")
            read(one, tmp_path, size)
        except UserError as error:
            assert "\n" not in str(error) and 0 < len(str(error)) < 3000

    run()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_bomb_needs_little_memory(tmp_path: Path, suffix: str) -> None:
    """One line of 200 MB."""
    (tmp_path / f"a.txt{suffix}").write_bytes(COMPRESS[suffix](bytes(200_000_000)))
    one = SMALL["text"](tmp_path).model_copy(update={"path": f"a.txt{suffix}"})
    tracemalloc.start()
    (fault,) = read(one, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(fault, Fault) and fault.what.startswith("longer than") and peak < 100_000_000
    assert files.is_compressed(fault.place.split()[0])
