"""A build gives the same bytes whatever runs its tasks, and however often it was killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import yaml
from rich.console import Console

from data_prep.build import build
from data_prep.run import How, Stage, Task, do, run
from data_prep.verify import verify
from infoxlm_ds.config import UserError
from infoxlm_ds.data.corpus import Corpus
from tests.corpus import ROOT
from tests.data_prep.small import describe

pytestmark = pytest.mark.timeout(300)
SIZES = {"inputs.SMALLEST_BLOCK": 2**15, "build.BUCKET": 2**14}  # bytes: many blocks and buckets of little text
SHARD = 2**17


@pytest.fixture(scope="module", autouse=True)
def many_tasks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as sizes:
        for name, size in SIZES.items():
            sizes.setattr(f"data_prep.{name}", size)
        sizes.setattr("data_prep.reduce.SHARD", SHARD)
        yield


@pytest.fixture(scope="module")
def description(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs that repeat in several files, and monolingual text, whose tokenizer is trained."""
    folder = tmp_path_factory.mktemp("texts")
    lines = (corpus.parent / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in (("a", lines[:250]), ("b", lines[100:350]), ("c", lines[300:])):
        (folder / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    (folder / "d.txt").write_text("\n".join(f"line {i} of a text\n" * (1 + i % 3) for i in range(300)))
    sources: list[dict[str, Any]] = [
        {"name": "nway.rows", "kind": "nway", "format": "jsonl", "path": "?.jsonl", "mono": True},
        {"name": "mono.lines", "kind": "mono", "format": "text", "path": "d.txt", "languages": ["en"]},
    ]
    tokenizer = {"vocab_size": 600, "sentences": 2000}
    return describe(folder, tokenizer, sources, max_tokens=40, languages=["de", "en", "hu"])


def files(corpus: Path) -> dict[str, bytes]:
    return {str(path.relative_to(corpus)): path.read_bytes() for path in corpus.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(description: Path, many_tasks: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The corpus from one process that nobody killed."""
    out = tmp_path_factory.mktemp("whole") / "corpus"
    build(description, out)
    assert verify(out) == [] and not out.with_name("corpus.work").exists()
    assert len(list(out.glob("nway.rows/*.tar"))) > 2
    assert Corpus(out).manifest.counts["duplicate_rows"] > 100
    return files(out)


@pytest.mark.parametrize("workers", [2, 5])
def test_any_number_of_workers_gives_the_same_bytes(
    description: Path, whole: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    build(description, tmp_path / "corpus", How(workers))
    assert files(tmp_path / "corpus") == whole


def test_ray_gives_the_same_bytes(description: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    try:
        build(description, tmp_path / "corpus", How(2, ray=True))
    finally:
        ray.shutdown()
    assert files(tmp_path / "corpus") == whole


def _start(description: Path, out: Path, how: How) -> subprocess.Popen[str]:
    settings = "".join(f"{name} = {size}; " for name, size in SIZES.items())
    script = (
        "from pathlib import Path; from data_prep import build, inputs, reduce; "
        f"from data_prep.run import How; {settings} reduce.SHARD = {SHARD}; "
        f"build.build(Path({str(description)!r}), Path({str(out)!r}), {how!r})"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True
    )


def test_parts_on_several_machines_give_the_same_bytes(
    description: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "corpus"
    processes = [_start(description, out, How(part=(i, 3))) for i in range(3)]
    for process in processes:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
    assert files(out) == whole
    shutil.rmtree(out)  # what the parts left does not count as this corpus
    build(description, out)
    assert files(out) == whole


def test_a_part_that_has_done_its_tasks_says_that_it_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = (Task(lambda _, out: out.touch(), None, tmp_path / name, 1) for name in ("mine", "other"))
    monkeypatch.setattr("data_prep.run.INTERVAL", 0)
    monkeypatch.setattr("data_prep.run.time.sleep", lambda _: do(other))  # the other part, meanwhile
    console = Console(width=200)
    with console.capture() as said:
        run(Stage("reading", [mine, other]), How(part=(0, 2)), console)
    *waiting, last = said.get().splitlines()
    assert "waiting for the other parts" in waiting[-1] and "left" not in waiting[-1]
    assert last.startswith("reading: 2 of 2 tasks") and "waiting" not in last


def test_a_build_that_is_killed_again_and_again_goes_on(
    description: Path, whole: dict[str, bytes], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    chance, out = random.Random(5), tmp_path / "corpus"
    for _ in range(request.config.getoption("--kills")):
        process = _start(description, out, How(2))
        try:
            process.wait(timeout=chance.uniform(0.5, 6))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    build(description, out, How(2))
    assert files(out) == whole


def test_what_is_done_is_not_done_again(description: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    with patch("data_prep.build.reduce_shard", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        build(description, out)
    assert len(list(tmp_path.glob("corpus.work/*/map-*/*"))) > 10
    with patch("data_prep.build.map_block", side_effect=AssertionError):
        build(description, out)
    assert files(out) == whole


def test_a_licence_that_is_stated_meanwhile_does_nothing_again(
    description: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(description.parent, tmp_path / "texts"))
    out = tmp_path / "corpus"
    with patch("data_prep.build.reduce_shard", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        build(folder / "corpus.yaml", out)
    tree = yaml.safe_load((folder / "corpus.yaml").read_text(encoding="utf-8"))
    tree["sources"][0] |= {"license": "cc-by-4.0", "homepage": "https://example.org"}
    (folder / "corpus.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    with patch("data_prep.build.map_block", side_effect=AssertionError):
        build(folder / "corpus.yaml", out)
    assert verify(out) == []
    assert files(out).items() - whole.items() == {("manifest.json", files(out)["manifest.json"])}
    stated = Corpus(out).manifest.prep["description"]["sources"][0]
    assert (stated["license"], stated["homepage"]) == ("cc-by-4.0", "https://example.org")


def test_what_changed_meanwhile_is_done_again(description: Path, tmp_path: Path) -> None:
    """Also the tokenizer, which was trained on the text before."""
    folder = Path(shutil.copytree(description.parent, tmp_path / "texts"))
    out = tmp_path / "corpus"
    with patch("data_prep.build.reduce_shard", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        build(folder / "corpus.yaml", out)
    lines = (folder / "a.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "a.jsonl").write_text("".join(lines[::2]), encoding="utf-8")
    build(folder / "corpus.yaml", out)
    build(folder / "corpus.yaml", tmp_path / "fresh")
    assert files(out) == files(tmp_path / "fresh")


def test_workers_end_with_the_command(description: Path, tmp_path: Path) -> None:
    process = _start(description, tmp_path / "corpus", How(2))
    workers: list[psutil.Process] = []
    while len(workers) < 2:
        children = psutil.Process(process.pid).children()
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        assert process.poll() is None
    process.kill()
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    process.communicate()


def test_a_worker_that_is_killed_is_told(description: Path, tmp_path: Path) -> None:
    with patch("data_prep.build.map_block", _die), pytest.raises(UserError, match="a worker was killed"):
        build(description, tmp_path / "corpus", How(2))
    assert (tmp_path / "corpus.work").is_dir()


def _die(task: object, out: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
