"""`infoxlm prep build` on the command line: exit codes, one line for a mistake, and no half-written corpus."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.data_prep.small import describe, write_rows

SOURCE = {"name": "nway.r", "kind": "nway", "format": "jsonl", "path": "r.jsonl"}


def prep(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the prep commands alone, in a process of their own."""
    command = [sys.executable, "-m", "data_prep", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_build_then_the_same_again_then_another_into_the_same_folder(corpus: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "r.jsonl", [{"en": "one", "de": "eins"}])
    tokenizer = {"path": str(corpus / "tokenizer")}
    description, out = describe(tmp_path, tokenizer, [SOURCE]), tmp_path / "deep" / "corpus"
    first = prep("build", description, out)
    assert first.returncode == 0 and first.stderr.endswith(f"{out}: done\n")
    checked = prep("verify", out)
    assert (checked.returncode, checked.stdout) == (0, f"{out}: every file is as it was written\n")
    again = prep("build", description, out)
    assert (again.returncode, again.stderr) == (0, f"{out}: prepared already\n")
    other = prep("build", describe(tmp_path, tokenizer, [SOURCE], max_tokens=7), out)
    assert other.returncode == 2 and "another description" in other.stderr and other.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [({"max_token": 7}, "max_token is not a known key"), ({"sources": [SOURCE | {"path": "x"}]}, "no such file")],
)
def test_a_users_mistake_is_one_line_and_exit_code_2_and_leaves_nothing(
    corpus: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    write_rows(tmp_path / "r.jsonl", [{"en": "one", "de": "eins"}])
    tree = {"name": "tiny", "tokenizer": {"path": str(corpus / "tokenizer")}, "sources": [SOURCE]} | change
    (tmp_path / "corpus.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    done = prep("build", tmp_path / "corpus.yaml", tmp_path / "corpus")
    assert done.returncode == 2
    assert done.stderr.startswith("infoxlm: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.yaml", "r.jsonl"]
