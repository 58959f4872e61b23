"""`infoxlm init` writes a description and a recipe that work as they are, and keeps held-out rows out of the corpus."""

from __future__ import annotations

import json
import lzma
from itertools import islice
from pathlib import Path

import pytest

from data_prep.build import build
from data_prep.starter import FILES, Base, Counted, init, next_commands
from infoxlm_ds.build import check_inputs
from infoxlm_ds.config import UserError
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.packs import text_id
from infoxlm_ds.data.text import read_nway
from infoxlm_ds.reading import load_recipe
from tests.corpus import EMBEDDED
from tests.data_prep.small import stored

PAIRS = 240


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with lzma.open(EMBEDDED / "home_assistant.train.jsonl.xz", "rt", encoding="utf-8") as lines:
        texts = (json.loads(line)["text"] for line in lines)
        with_german = ({k: " ".join(v.split()) for k, v in text.items()} for text in texts if "de" in text)
        return list(islice(with_german, PAIRS))


@pytest.fixture
def files(rows: list[dict[str, str]], tmp_path: Path) -> list[Path]:
    for code in ("en", "de"):
        (tmp_path / code).write_text("".join(f"{row[code]}\n" for row in rows), encoding="utf-8")
    return [tmp_path / "en", tmp_path / "de"]


def test_two_files_become_a_corpus_and_a_recipe_without_editing(files: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "a folder: #1"
    counted = init(folder, files, ["en", "de"], None, 0)
    assert (counted.rows, counted.languages, len(counted.held_out)) == (PAIRS, ("de", "en"), PAIRS // 20)
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe.run == folder / "run" and recipe.probe is not None and recipe.probe.data == folder / "dev.jsonl"
    assert isinstance(recipe.corpus, Path)
    build(folder / "corpus.yaml", recipe.corpus)
    for world in recipe.batch.worlds:
        check_inputs(recipe, 0, world).loader.close()


def test_held_out_rows_are_not_in_the_corpus(files: list[Path], tmp_path: Path) -> None:
    init(tmp_path / "mine", files, ["en", "de"], None, 0)
    build(tmp_path / "mine" / "corpus.yaml", tmp_path / "corpus")
    kept = {text for row in stored(Corpus(tmp_path / "corpus"), "para.own") for _, text in row.values()}
    held_out = {text_id(text) for row in read_nway(tmp_path / "mine" / "dev.jsonl") for text in row.values()}
    assert len(held_out) == 2 * (PAIRS // 20) and not held_out & kept and len(kept) > PAIRS


@pytest.mark.parametrize("form", ["tsv", "jsonl"])
def test_one_file_holds_out_the_same_rows_as_two(
    form: str, rows: list[dict[str, str]], files: list[Path], tmp_path: Path
) -> None:
    pairs = [{code: row[code] for code in ("en", "de")} for row in rows]
    lines = {"tsv": ["\t".join(p.values()) for p in pairs], "jsonl": [json.dumps({"text": p}) for p in pairs]}
    (tmp_path / f"pairs.{form}").write_text("\n".join(lines[form]), encoding="utf-8")
    init(tmp_path / "two", files, ["en", "de"], None, 0)
    init(tmp_path / "one", [tmp_path / f"pairs.{form}"], ["en", "de"], None, 0)
    assert (tmp_path / "one" / "dev.jsonl").read_bytes() == (tmp_path / "two" / "dev.jsonl").read_bytes()


def test_rows_of_many_languages_are_n_way_with_english_as_pivot(rows: list[dict[str, str]], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    counted = init(tmp_path / "mine", [tmp_path / "rows.jsonl"], [], None, 0)
    assert len(counted.languages) > 10 and "kind: nway" in (tmp_path / "mine" / "corpus.yaml").read_text()
    assert load_recipe(tmp_path / "mine" / "recipe.yaml").sampling.pivot == "en"


@pytest.mark.parametrize("gpus", [0, 1, 3, 8, 12])
def test_every_gpu_gets_lanes(gpus: int, files: list[Path], tmp_path: Path) -> None:
    init(tmp_path / "mine", files, ["en", "de"], None, gpus)
    recipe = load_recipe(tmp_path / "mine" / "recipe.yaml")
    assert max(gpus, 2) in recipe.batch.worlds or gpus == 1
    assert str(recipe.engine) == ("zero1_bf16" if gpus else "zero1_fp32")


def test_a_model_to_start_from_gives_its_tokenizer_too(files: list[Path], tmp_path: Path) -> None:
    init(tmp_path / "mine", files, ["en", "de"], Base("FacebookAI/xlm-roberta-base", 12, 512), 0)
    recipe, text = load_recipe(tmp_path / "mine" / "recipe.yaml"), (tmp_path / "mine" / "corpus.yaml").read_text()
    assert recipe.model.init == "FacebookAI/xlm-roberta-base" and recipe.model.universal_layer == 8
    assert "path: FacebookAI/xlm-roberta-base" in text and "max_tokens: 254" in text


def test_it_never_overwrites(files: list[Path], tmp_path: Path) -> None:
    for name in FILES:
        folder = tmp_path / f"with {name}"
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(UserError, match=f"{name} exists"):
            init(folder, files, ["en", "de"], None, 0)
        assert [path.name for path in folder.iterdir()] == [name] and (folder / name).read_text() == "mine"


def test_what_is_no_parallel_text_is_told_and_nothing_is_written(files: list[Path], tmp_path: Path) -> None:
    english, german = files
    (tmp_path / "short").write_text("eins\nzwei\n")
    (tmp_path / "empty").touch()
    (tmp_path / "few.tsv").write_text("one\teins\n" * 20)
    (tmp_path / "broken.tsv").write_text("one\teins\n" * 20 + "two\n")
    for given, languages, words in [
        ([english, tmp_path / "short"], ["en", "de"], "the same number of lines.*240.*2"),
        ([english, german], ["en"], "name the language of each"),
        ([english, german], ["en", "en"], "name the language of each"),
        ([tmp_path / "empty", tmp_path / "empty"], ["en", "de"], "no row has two languages: give at least 100 rows"),
        ([english], ["en"], "two files or more"),
        ([english, tmp_path / "none"], ["en", "de"], "no such file"),
        ([tmp_path / "few.tsv"], [], "each column"),
        ([tmp_path / "few.tsv"], ["en", "de"], "only 20 rows"),
        ([tmp_path / "broken.tsv"], ["en", "de"], "line 21: 1 columns"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            init(tmp_path / "mine", given, languages, None, 0)
        assert "\n" not in str(caught.value) and not (tmp_path / "mine").exists()


def test_a_language_that_no_filter_knows_is_named() -> None:
    said = next_commands(Path("mine"), Counted(200, 9000, 60, ("en", "swahili"), []))
    assert said.startswith("swahili: no known code") and "en:" not in said
    assert next_commands(Path("mine"), Counted(200, 9000, 60, ("en", "sw"), [])).startswith("mine: 200 rows of en, sw")
