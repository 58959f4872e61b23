"""Every format of files that the tasks come in is read; each mistake is one line that names the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infoxlm_ds.config import UserError
from infoxlm_ds.evaluation.finetune.data import read_data
from infoxlm_ds.evaluation.finetune.files import labels_of, languages_of, read_split
from infoxlm_ds.evaluation.finetune.tasks import TASKS
from tests.evaluation.finetune.made_up import question, settings, write_json, write_pairs, write_questions, write_words

XNLI, PAWSX, NER, POS, MLQA, XQUAD, TYDIQA = (
    TASKS[name] for name in ("xnli", "pawsx", "ner", "pos", "mlqa", "xquad", "tydiqa")
)


def _write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("prefix", [("XNLI-MT-1.0/multinli/", "XNLI-1.0/"), ("", "")])
def test_xnli_as_it_is_published(tmp_path: Path, prefix: tuple[str, str]) -> None:
    train = "premise\thypo\tlabel\nA .\tB .\tcontradictory\nC .\tD .\tneutral\n"
    _write(tmp_path, f"{prefix[0]}multinli.train.en.tsv", train)
    header = "language\tgold_label\tsentence1_binary_parse\tsentence1\tsentence2\tmatch\n"
    rows = "en\tneutral\t( x )\tOne.\tTwo.\tTrue\nde\tentailment\t( x )\tEins.\tZwei.\tTrue\n"
    rows += "de\t-\t( x )\tDrei.\tVier.\tTrue\n"
    for split in ("dev", "test"):
        _write(tmp_path, f"{prefix[1]}xnli.{split}.tsv", header + rows)
    assert languages_of(XNLI, tmp_path) == ["en", "de"]
    assert [(x.texts, x.labels) for x in read_split(XNLI, tmp_path, "en", "train")] == [
        (["A .", "B ."], ["contradiction"]),
        (["C .", "D ."], ["neutral"]),
    ]
    (german,) = read_split(XNLI, tmp_path, "de", "test")
    assert (german.texts, german.labels, german.numbers) == (["Eins.", "Zwei."], ["entailment"], [3])


def test_pawsx_as_it_is_published(tmp_path: Path) -> None:
    write_pairs(tmp_path / "x", train=3)
    _write(tmp_path / "x", "fr/translated_train.tsv", 'id\tsentence1\tsentence2\tlabel\n1\t"Un" .\tDeux .\t0\n')
    assert languages_of(PAWSX, tmp_path / "x") == ["en", "de", "ru"]
    assert len(read_split(PAWSX, tmp_path / "x", "en", "train")) == 3
    (french,) = read_split(PAWSX, tmp_path / "x", "fr", "train")
    assert (french.texts, french.labels) == (['"Un" .', "Deux ."], ["0"])


def test_wikiann_and_xtreme_files_of_words(tmp_path: Path) -> None:
    _write(tmp_path, "de/test", "de:Anna\tB-PER\nde:lacht\tO\n\nde::\tO\n")
    _write(tmp_path, "test-en.tsv", "Anna\tB-PER\nlaughs\tO\n")
    assert languages_of(NER, tmp_path) == ["en", "de"]
    german = read_split(NER, tmp_path, "de", "test")
    assert [(x.texts, x.labels, x.numbers) for x in german] == [
        (["Anna", "lacht"], ["B-PER", "O"], [1, 2]),
        ([":"], ["O"], [4]),
    ]
    assert read_split(NER, tmp_path, "en", "test")[0].texts == ["Anna", "laughs"]
    assert labels_of(NER, german) == ["O", "B-PER", "I-PER"]


CONLLU = """# text = Vámonos al mar
1-2\tVámonos\t_\t_\t_\t_\t_\t_\t_\t_
1\tVamos\tir\tVERB\t_\t_\t0\troot\t_\t_
2\tnos\tnosotros\tPRON\t_\t_\t1\tobj\t_\t_
2.1\tx\tx\tX\t_\t_\t_\t_\t_\t_

1\tmar\tmar\tNOUN\t_\t_\t0\troot\t_\t_
"""


@pytest.mark.parametrize("name", ["UD_Spanish-GSD/es_gsd-ud-test.conllu", "es_gsd-ud-test.conllu", "es/test.conllu"])
def test_universal_dependencies_as_they_are_published(tmp_path: Path, name: str) -> None:
    _write(tmp_path, name, CONLLU)
    assert languages_of(POS, tmp_path) == ["es"]
    first, second = read_split(POS, tmp_path, "es", "test")
    assert (first.texts, first.labels) == (["Vamos", "nos"], ["VERB", "PRON"]) and second.texts == ["mar"]


def test_all_treebanks_of_a_language_are_read(tmp_path: Path) -> None:
    for bank in ("gsd", "ancora"):
        _write(tmp_path, f"UD_Spanish-{bank}/es_{bank}-ud-test.conllu", CONLLU)
    assert len(read_split(POS, tmp_path, "es", "test")) == 4


@pytest.mark.parametrize("prefix", ["", "MLQA_V1/"])
def test_mlqa_as_it_is_published(tmp_path: Path, prefix: str) -> None:
    for split in ("dev", "test"):
        for languages in (("de", "de"), ("en", "en"), ("de", "en")):
            name = "{}-context-{}-question-{}.json".format(split, *languages)
            write_json(tmp_path / f"{prefix}{split}" / name, [question(split, "Das Licht ist an.", "Licht")])
    write_json(tmp_path / "squad" / "train-v1.1.json", [question("1", "The lamp.", "lamp")])
    write_json(tmp_path / "de_squad-translate-train-train-v1.1.json", [question("1", "Die Lampe.", "Lampe")])
    assert languages_of(MLQA, tmp_path) == ["en", "de"]
    (german,) = read_split(MLQA, tmp_path, "de", "dev")
    assert (german.texts, german.labels, german.numbers) == (["the door?", "Das Licht ist an."], ["Licht"], [4])
    assert read_split(MLQA, tmp_path, "en", "train")[0].labels == ["lamp"]
    assert read_split(MLQA, tmp_path, "de", "train")[0].labels == ["Lampe"]


def test_xquad_beside_squad_as_xtreme_lays_them(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        write_json(tmp_path / "squad" / f"{split}-v1.1.json", [question("1", "The lamp.", "lamp")])
    write_json(tmp_path / "xquad" / "xquad.zh.json", [question("1", "北京大学", "北京")])
    assert languages_of(XQUAD, tmp_path / "xquad") == ["zh"]
    assert read_split(XQUAD, tmp_path / "xquad", "en", "dev")[0].labels == ["lamp"]
    with pytest.raises(UserError, match=r"no train file of zh: expected one of zh/train.json"):
        read_split(XQUAD, tmp_path / "xquad", "zh", "train")


def test_tydiqa_in_one_file_or_by_language(tmp_path: Path) -> None:
    rows = [question(f"{name}-{i}", "The lamp.", "lamp") for i, name in enumerate(("english", "swahili", "english"))]
    for split in ("train", "dev"):
        write_json(tmp_path / f"tydiqa-goldp-v1.1-{split}.json", rows)
    assert languages_of(TYDIQA, tmp_path) == ["en", "sw"]
    assert [len(read_split(TYDIQA, tmp_path, code, "train")) for code in ("en", "sw")] == [2, 1]
    write_json(tmp_path / "tydiqa-goldp-v1.1-dev" / "tydiqa.goldp.ko.dev.json", rows)
    assert languages_of(TYDIQA, tmp_path) == ["en", "ko", "sw"] and len(read_split(TYDIQA, tmp_path, "ko", "test")) == 3
    for number, name in enumerate(("tydiqa.goldp.ko", "tydiqa.ko"), 1):  # XTREME has had both names
        write_json(tmp_path / "tydiqa-goldp-v1.1-train" / f"{name}.train.json", rows[:number])
        assert len(read_split(TYDIQA, tmp_path, "ko", "train")) == number


def test_misplaced_answers_are_left_out_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_questions(tmp_path, train=4)
    rows = [question("1", "The lamp.", "lamp"), question("2", "The lamp.", "lamp", 0)]
    write_json(tmp_path / "train-v1.1.json", rows)
    chosen = settings("xquad", Path("model"), tmp_path, Path("out"))
    assert len(read_data(chosen).train) == 1
    assert "1 of 2 training questions have a misplaced answer: left out" in capsys.readouterr().out
    write_json(tmp_path / "train-v1.1.json", rows[1:])
    _refused("xquad", tmp_path, "train-v1.1.json: no answer lies where answer_start says")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "train-v1.1.json: not in the format of SQuAD v1.1: Expecting"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', "train-v1.1.json: no examples in it"),
        ('{"data": [{"paragraphs": 3}]}', "train-v1.1.json: not in the format"),
        ('{"version": "1.1"}', "train-v1.1.json: not in the format of SQuAD v1.1: 'data' is missing"),
        (
            '{"data": [{"paragraphs": [{"context": "a", "qas": [{"id": "x", "question": "q", "answers": []}]}]}]}',
            "train-v1.1.json: question x has no answer",
        ),
        (
            '{"data": [{"paragraphs": [{"context": "a", "qas": [{"id": "x", "question": "q", "answers": '
            '[{"text": "ab", "answer_start": 0}]}]}]}]}',
            "train-v1.1.json: question x: answer 'ab' at 0 does not lie in its context",
        ),
    ],
)
def test_each_mistake_in_questions_is_named(tmp_path: Path, text: str, message: str) -> None:
    write_questions(tmp_path, train=4)
    _write(tmp_path, "train-v1.1.json", text)
    _refused("xquad", tmp_path, message)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("en/train.tsv", "id\tsentence1\tsentence2\tlabel\n1\ta\tb\n", "train.tsv line 2: 3 columns, expected 4"),
        ("en/train.tsv", "id\tfirst\tsecond\tlabel\n1\ta\tb\t0\n", "train.tsv line 1: 4 columns, expected 3"),
        ("en/train.tsv", "id\tsentence1\tsentence2\tlabel\n", "train.tsv: no examples in it"),
        ("en/train.tsv", "id\tsentence1\tsentence2\tlabel\n1\ta\tb\t2\n", "train.tsv line 2: unknown label '2'"),
        ("de/test_2k.tsv", "id\tsentence1\tsentence2\tlabel\n1\ta\tb\tx\n", "test_2k.tsv line 2: unknown label 'x'"),
        ("en/dev_2k.tsv", "", "dev_2k.tsv: no examples in it"),
    ],
)
def test_each_mistake_in_pairs_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    write_pairs(tmp_path, train=2)
    _write(tmp_path, name, text)
    _refused("pawsx", tmp_path, message)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("en/train", "en:Anna\tB-PER\nlaughs\n", "train line 2: 1 columns, expected 2"),
        ("en/train", "en:Anna\tPER\n", "train line 1: label 'PER': expected O, B-TYPE or I-TYPE"),
        ("de/test", "de:Anna\tB-PER\n", "test line 1: unknown label 'B-PER': the labels are O, B-LOC, I-LOC"),
    ],
)
def test_each_mistake_in_words_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    write_words(tmp_path, train=5)
    _write(tmp_path, name, text)
    _refused("ner", tmp_path, message)


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    _refused("pawsx", tmp_path / "none", "none: no such folder")
    _refused("pawsx", tmp_path, r"no test file of a language there: expected LANG/test_2k.tsv")
    write_pairs(tmp_path, train=2)
    _refused("pawsx", tmp_path, "--languages sw: no test file in .*: there are en, de, ru", languages=("sw",))
    _refused("pawsx", tmp_path, "no train file of sw: expected one of sw/train.tsv", train_languages=("sw",))
    (tmp_path / "en" / "dev_2k.tsv").unlink()
    _refused("pawsx", tmp_path, "no dev file of en: expected one of en/dev_2k.tsv.*; --select chooses whose")
    options: dict[str, Any] = {"select": "target", "languages": ("en",)}
    _refused("pawsx", tmp_path, "--select target: all evaluated languages are trained on", **options)


def _refused(task: str, data: Path, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_data(settings(task, Path("model"), data, Path("out"), **options))
    assert "\n" not in str(error.value)
