"""The command lines in the documentation's blocks, each run as it stands there, on small files of those names."""

from __future__ import annotations

import json
import lzma
import shlex
import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml

from tests.corpus import EMBEDDED, write_corpus
from tests.distributed.ranks import run_ranks
from tests.evaluation.finetune.made_up import question, write_json
from tests.integration.commands import infoxlm_here, train_here, write_recipe
from tests.test_docs import TEXTS, commands_of, named

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# What takes minutes or needs hosts or a server, and the file of tests that runs the like of it.
ELSEWHERE = {
    "infoxlm demo": "integration/test_first_run.py",
    "infoxlm init": "integration/test_first_run.py",
    "infoxlm train mine/recipe.yaml": "integration/test_first_run.py",
    "infoxlm train --hostfile": "integration/test_two_hosts.py",
    "infoxlm train my.yaml corpus=s3:": "data/test_store.py",
    "infoxlm prep build hard.yaml": "evaluation/test_hard_negatives.py",
    "infoxlm train demo": "evaluation/test_hard_negatives.py",
    "infoxlm mine --hard-negatives 4 data_prep/": "evaluation/test_hard_negatives.py",
    "infoxlm embed": "evaluation/test_vectors.py",  # of standard input
    "infoxlm publish": "publish/test_upload.py",
    "infoxlm eval mteb": "evaluation/test_mteb.py",
}
SETTINGS = {
    "optimizer": {"learning_rate": 1e-2, "steps": 8, "warmup": 1},
    "batch": {"lanes": 8, "mmlm_tokens": 40, "tlm_tokens": 60, "xlco_pairs": 4},
    "checkpoint": {"every": 2, "keep": 9},
    "log": {"every": 1, "tensorboard": False},
}
# What names one thing for others, or would not fit to small files.
INSTEAD = {
    "--step 6000": "--step 8",
    "--layer 12": "--layer 1",
    "REASON": "length_ratio",
    "KEY.PATH=VALUE": "optimizer.steps=9",
    "merge OUT CORPUS CORPUS": "merge BOTH OUT talks",
    "--workers 8": "--workers 1",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a run of eight steps, its model, and text, under the names that the pages give them."""
    folder = tmp_path_factory.mktemp("place")
    corpus = write_corpus(folder).rename(folder / "my-corpus")
    shutil.copytree(corpus, folder / "web")
    (folder / "CORPUS.yaml").symlink_to("corpus.yaml")
    (folder / "mine").mkdir()
    description = (folder / "corpus.yaml").read_text(encoding="utf-8")
    (folder / "mine" / "corpus.yaml").write_text(description.replace("rows.jsonl", "../rows.jsonl"), encoding="utf-8")
    with chdir(folder):
        write_recipe(Path("my-corpus"), Path("my-run"), **SETTINGS).rename("my.yaml")
        (folder / "RECIPE").symlink_to("my.yaml")
        assert run_ranks(train_here, 1, "my.yaml") == [0]
    for name in ("RUN", "first", "second", "mine/run", "runs/demo"):
        shutil.copytree(folder / "my-run", folder / name)
    assert infoxlm_here("export", folder / "my-run", folder / "my-model").returncode == 0
    _write_texts(folder)
    _write_tasks(folder)
    fewer = yaml.safe_load(description) | {"tokenizer": {"path": "my-corpus/tokenizer"}}
    fewer["sources"][0]["path"] = "pairs.jsonl"
    _write(folder / "talks.yaml", yaml.safe_dump(fewer))
    assert infoxlm_here("prep", "build", folder / "talks.yaml", folder / "talks").returncode == 0
    return folder


def _write_texts(folder: Path) -> None:
    """Sixty rows of held-out text, in each form that a page names."""
    data = EMBEDDED / "home_assistant.dev.jsonl.xz"
    shutil.copy(data, folder / "dev.jsonl.xz")
    with lzma.open(data, "rt", encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if {"en", "de"} <= row["text"].keys()][:60]
    for name in ("pairs.jsonl", "mine/dev.jsonl"):
        _write(folder / name, *(json.dumps(row) for row in rows))
    for code, here in (("en", "en"), ("de", "de"), ("de", "sw")):
        texts = [" ".join(row["text"][code].split()) for row in rows]
        for name in (f"news.{here}", f"test.{here}", f"tatoeba/Tatoeba.de-en.{here}"):
            _write(folder / name, *texts)
        _write(folder / f"bucc2018/de-en/de-en.training.{here}", *(f"{here}-{i}\t{x}" for i, x in enumerate(texts)))
    _write(folder / "bucc2018" / "de-en" / "de-en.training.gold", *(f"de-{i}\ten-{i}" for i in range(20)))
    _write(folder / "test.talp", *(["1-1"] * len(rows)))


def _write_tasks(folder: Path) -> None:
    """XNLI, PAWS-X and MLQA in the layouts in which they are published."""
    labels = ("entailment", "neutral", "contradiction")
    _write(folder / "XNLI" / "multinli.train.en.tsv", "premise\thypo\tlabel", *(f"A.\tB.\t{x}" for x in labels))
    for split in ("dev", "test"):
        rows = (f"{code}\t{label}\tA.\tB." for code in ("en", "de") for label in labels)
        _write(folder / "XNLI" / f"xnli.{split}.tsv", "language\tgold_label\tsentence1\tsentence2", *rows)
        for code in ("de", "en"):
            name = f"MLQA_V1/{split}/{split}-context-{code}-question-{code}.json"
            write_json(folder / name, [question("1", "The lamp is on.", "lamp")])
    write_json(folder / "MLQA_V1" / "squad" / "train-v1.1.json", [question("1", "The lamp is on.", "lamp")])
    for code in ("en", "de", "fr", "ru"):
        for split in ("train", "translated_train", "dev_2k", "test_2k"):
            rows = (f"{i}\tOne.\tTwo.\t{i % 2}" for i in range(4))
            _write(folder / "x-final" / code / f"{split}.tsv", "id\tsentence1\tsentence2\tlabel", *rows)


def _write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _lines(page: Path) -> Iterator[str]:
    for command in commands_of(page):
        if command.whole and not command.line.startswith(tuple(ELSEWHERE)):
            yield command.line


@pytest.mark.parametrize("page", [page for page in TEXTS if any(_lines(page))], ids=named)
def test_commands_of_a_page_run(page: Path, place: Path, tmp_path: Path) -> None:
    here = shutil.copytree(place, tmp_path / "here", symlinks=True)
    for line in dict.fromkeys(_lines(page)):
        for written, instead in INSTEAD.items():
            line = line.replace(written, instead)
        command, *words = shlex.split(line)[1:]
        if command == "train" and "--dry-run" not in words:
            shutil.rmtree(here / "my-run")  # it is done, and would do nothing
            assert run_ranks(_train, 1, here, *words) == [0], line
            continue
        if command == "export":
            shutil.rmtree(here / words[1], ignore_errors=True)
        if command == "finetune":
            (done,) = run_ranks(_finetune, 1, here, *words)
        else:
            done = infoxlm_here(command, *words, folder=here)
        assert done.returncode == 0, (line, done.stdout, done.stderr)


def _train(rank: int, world: int, here: Path, *words: str) -> int:
    """Without the launcher."""
    with chdir(here):
        return train_here(rank, world, *words)


def _finetune(rank: int, world: int, here: Path, *words: str) -> CompletedProcess[str]:
    """In a process of its own, because it joins ranks."""
    return infoxlm_here("finetune", *words, folder=here)


def test_what_runs_elsewhere_is_there() -> None:
    lines = [command.line for page in TEXTS for command in commands_of(page) if command.whole]
    for start, file in ELSEWHERE.items():
        assert any(line.startswith(start) for line in lines), f"{start}: on no page"
        assert (Path(__file__).parents[1] / file).is_file()
