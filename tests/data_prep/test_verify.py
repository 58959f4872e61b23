"""`verify` detects any flipped bit, and missing or extra files. The commands end with the right exit codes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from data_prep.cli import app
from data_prep.verify import verify
from infoxlm_ds.config import UserError
from infoxlm_ds.data.manifest import load_manifest


@pytest.fixture(scope="module")
def copy(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the corpus, for tests that damage it and repair it."""
    return Path(shutil.copytree(corpus, tmp_path_factory.mktemp("copy") / "corpus"))


def test_an_untouched_corpus_is_right(corpus: Path) -> None:
    assert verify(corpus) == []


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_one_flipped_bit_in_any_file_is_found_and_the_file_named(copy: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(path for path in copy.rglob("*") if path.is_file())))
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(changed)
    problems = verify(copy)
    path.write_bytes(whole)
    assert len(problems) == 1 and str(path) in problems[0]


def test_missing_and_surplus_files_are_found(copy: Path) -> None:
    shard = next(iter(sorted(copy.rglob("*.tar"))))
    whole = shard.read_bytes()
    shard.unlink()
    (copy / "nway.rows" / "more.tar").write_bytes(b"")
    problems = verify(copy)
    shard.write_bytes(whole)
    (copy / "nway.rows" / "more.tar").unlink()
    assert problems == sorted([f"{shard}: missing", f"{copy / 'nway.rows' / 'more.tar'}: not part of the corpus"])


def test_figures_that_do_not_agree_with_the_packs_are_found(copy: Path) -> None:
    whole = (copy / "manifest.json").read_bytes()
    manifest = load_manifest(copy)
    first = manifest.sources[0]
    sources = (first.model_copy(update={"items": first.items + 1}), *manifest.sources[1:])
    (copy / "manifest.json").write_text(manifest.model_copy(update={"sources": sources}).render(), encoding="utf-8")
    problems = verify(copy)
    (copy / "manifest.json").write_bytes(whole)
    assert len(problems) == 1 and first.name in problems[0]


def test_what_is_no_corpus_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prepared corpus"):
        verify(tmp_path)


def test_verify_ends_with_0_or_1(copy: Path) -> None:
    assert CliRunner().invoke(app, ["verify", str(copy)]).exit_code == 0
    index = copy / "nway.rows" / "nway.rows.index.npy"
    whole = index.read_bytes()
    index.write_bytes(whole[:-1])
    result = CliRunner().invoke(app, ["verify", str(copy)])
    index.write_bytes(whole)
    assert result.exit_code == 1 and str(index) in result.output


def test_stat_prints_the_figures_of_every_source(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    printed = CliRunner().invoke(app, ["stat", str(corpus)]).output
    for source in load_manifest(corpus).sources:
        (line,) = (line for line in printed.splitlines() if re.search(rf"\b{re.escape(source.name)}\b", line))
        assert f"{source.items:,}" in line and f"{source.tokens:,}" in line
        assert all(language in line for language in source.languages)


def test_the_package_runs_by_itself_and_a_users_mistake_is_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_prep", "stat", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "no prepared corpus" in done.stderr


def test_reading_a_corpus_does_not_import_torch() -> None:
    script = (
        "import sys, data_prep.cli, data_prep.description, data_prep.verify, infoxlm_ds.data.stream;"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
