"""The command line: fast help, exit codes, and `eval retrieval` from files to a table and JSON."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from infoxlm_ds import cli
from infoxlm_ds.config import UserError

LAMP = {"en": "The lamp is on.", "ru": "Лампа включена.", "de_DE": "Das Licht ist an."}
DOOR = {"en": "Open the door, please.", "ru": "Откройте, пожалуйста, дверь.", "de_DE": "Bitte öffne die Tür."}
KITCHEN = {"en": "The kitchen", "ru": "Кухня"}


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit code of `infoxlm ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["infoxlm", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def parallel_text(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"key": str(i), "text": text} for i, text in enumerate([LAMP, DOOR, KITCHEN])]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_help_imports_nothing_heavy() -> None:
    script = """
import sys
from infoxlm_ds.cli import main
sys.argv = ["infoxlm", "--help"]
try:
    main()
finally:
    print("heavy:", {"torch", "transformers", "deepspeed", "sklearn", "matplotlib"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "heavy: set()" in done.stdout
    assert all(verb in done.stdout for verb in ("train", "prep", "export", "eval", "finetune"))


def test_a_users_mistake_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = _run(monkeypatch, "eval", "retrieval", "--model", tmp_path, "--data", tmp_path / "none.jsonl")
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("infoxlm: ") and error.count("\n") == 1 and "none.jsonl" in error


def test_a_mistake_in_fine_tuning_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folders = ("--model", tmp_path, "--data", tmp_path / "none", "--out", tmp_path / "out")
    assert _run(monkeypatch, "finetune", "xnli", *folders) == 2
    error = capsys.readouterr().err
    assert error.startswith("infoxlm: ") and error.count("\n") == 1 and "no such folder" in error


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", "retrieval"),
        ("no-such-verb",),
        ("eval", "retrieval", "--data", "x", "--model", "y", "--pooling", "max"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert _run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("infoxlm: ") and error.count("\n") == 1 and "--help`" in error


def test_a_group_of_verbs_alone_shows_its_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, "prep") == 2
    assert "verify" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("raised", "code"),
    [(UserError("no"), 2), (SystemExit(75), 75), (typer.Exit(1), 1), (KeyboardInterrupt(), 130)],
    ids=repr,
)
def test_how_a_verb_ends_decides_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int
) -> None:
    def stop() -> None:
        raise raised

    monkeypatch.setattr(cli.app, "registered_commands", list(cli.app.registered_commands))
    cli.app.command("stop")(stop)
    assert _run(monkeypatch, "stop") == code


def test_retrieval_prints_a_table_and_writes_rows(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    parallel_text: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "results" / "rows.json"
    common = ("eval", "retrieval", "--model", model_folder, "--data", parallel_text, "--min-pairs", "2")
    assert _run(monkeypatch, *common, "--json", out) == 0
    table = capsys.readouterr().out
    assert "ru *" in table and "mean of 2" in table and "mean of 1 *" in table
    result = json.loads(out.read_text(encoding="utf-8"))
    german, russian = result["languages"]
    assert [(row["lang"], row["n"], row["layer"], row["cross_script"]) for row in (german, russian)] == [
        ("de_DE", 2, 2, False),
        ("ru", 3, 2, True),
    ]
    assert list(russian) == [
        *("forward", "backward", "low", "high", "trigram_forward", "trigram_backward", "chance"),
        *("data", "lang", "n", "script", "cross_script", "layer", "pooling", "projected", "score"),
    ]
    assert [(mean["group"], mean["languages"]) for mean in result["means"]] == [
        *(("all", 2), ("cross-script", 1), ("script CYRILLIC", 1), ("script LATIN", 1)),
        *(("family Germanic", 1), ("family Slavic", 1)),
    ]
    assert (
        russian["data"] == str(parallel_text)
        and russian["pooling"] == "mean"
        and russian["chance"] == pytest.approx(1 / 3)
    )


@pytest.mark.parametrize(
    "verb", [("retrieval",), ("layers",), ("bucc",), ("alignment", "--gold", "x", "--text", "a", "b")]
)
def test_a_json_path_that_cannot_be_written_costs_no_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: tuple[str, ...]
) -> None:
    (tmp_path / "file").touch()
    files = ("--model", tmp_path / "none", *(() if "alignment" in verb else ("--data", tmp_path / "none")))
    for wrong, why in ((tmp_path, "is a folder"), (tmp_path / "file" / "rows.json", "cannot be written")):
        assert _run(monkeypatch, "eval", *verb, *files, "--json", wrong) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"infoxlm: --json {wrong} {why}") and error.count("\n") == 1


def test_a_wrong_name_of_another_model_costs_no_work(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    parallel_text: Path,
    tmp_path: Path,
) -> None:
    pytest.importorskip("sentence_transformers")
    monkeypatch.setattr("infoxlm_ds.evaluation.results.evaluate_all", None)
    common = ("eval", "retrieval", "--model", model_folder, "--data", parallel_text, "--min-pairs", "2")
    assert _run(monkeypatch, *common, "--languages", "de, ru", "--beside", tmp_path / "none") == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_all_layers_of_chosen_languages(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    parallel_text: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "rows.json"
    files = ("--data", parallel_text, "--data", parallel_text, "--json", out)
    options = ("--layer", "all", "--languages", "de", "--min-pairs", "2", "--pooling", "both", "--score", "csls")
    assert _run(monkeypatch, "eval", "retrieval", "--model", model_folder, *files, *options) == 0
    assert "mean of 1" in capsys.readouterr().out
    rows = json.loads(out.read_text(encoding="utf-8"))["languages"]
    assert [(row["lang"], row["layer"], row["pooling"], row["score"]) for row in rows] == [
        ("de_DE", layer, pooling, "csls") for layer in range(4) for pooling in ("mean", "cls")
    ]


def test_another_model_stands_beside_on_the_same_pairs(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    parallel_text: Path,
    tmp_path: Path,
) -> None:
    pytest.importorskip("sentence_transformers")
    out = tmp_path / "rows.json"
    common = ("eval", "retrieval", "--model", model_folder, "--data", parallel_text, "--min-pairs", "2", "--layer", "3")
    assert _run(monkeypatch, *common, "--pooling", "mean", "--beside", model_folder, "--json", out) == 0
    assert "3/own" in capsys.readouterr().out
    result = json.loads(out.read_text(encoding="utf-8"))
    (other,) = result["beside"].values()  # the same model, as sentence-transformers runs it
    for ours, theirs in zip(result["languages"], other["languages"], strict=True):
        assert (ours["forward"], ours["backward"], ours["n"]) == (theirs["forward"], theirs["backward"], theirs["n"])
    assert _run(monkeypatch, *common, "--beside", tmp_path / "none") == 2
    assert _run(monkeypatch, *common[:-2], "--layer", "all", "--beside", model_folder) == 2
    problem, order = capsys.readouterr().err.splitlines()[-2:]
    assert f"--beside {tmp_path / 'none'} cannot be loaded" in problem and "give one --layer" in order


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layer", "first"), "--layer first: expected a number or all"),
        (("--layer", "9"), "layer 9 is out of range"),
        (("--pivot", "sw"), "no row has the pivot language 'sw'"),
        (("--languages", "ko"), "no requested language has 2 pairs"),
        (("--languages", "ru,ko"), "--languages ko: no file has 2 pairs of 'ko'"),
        (("--min-pairs", "4"), "lower --min-pairs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_each_mistake_names_its_remedy(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    parallel_text: Path,
    options: tuple[str, ...],
    message: str,
) -> None:
    assert (
        _run(
            monkeypatch,
            "eval",
            "retrieval",
            "--model",
            model_folder,
            "--data",
            parallel_text,
            "--min-pairs",
            "2",
            *options,
        )
        == 2
    )
    assert message in capsys.readouterr().err


def _commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in getattr(group, "commands", {}).items():
        yield (*path, name), command
        yield from _commands(command, (*path, name))


def test_usage_lines_name_what_may_be_repeated_once() -> None:
    found = dict(_commands(typer.main.get_command(cli.app)))
    assert ("prep", "mix") in found and ("demo",) in found
    for path, command in found.items():
        pieces = command.get_usage(command.make_context(" ".join(path), [], resilient_parsing=True))
        assert not re.search(r"\[\[|\.\.\.[\]}]|\{\{", pieces), pieces
        assert pieces.count("KEY.PATH=VALUE") <= 1


def test_the_version_names_what_a_report_of_a_bug_needs() -> None:
    script = """
import sys
from infoxlm_ds.cli import main
sys.argv = ["infoxlm", "--version"]
try:
    main()
finally:
    print("heavy:", {"torch", "transformers", "deepspeed"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        "Python",
        "infoxlm-ds",
        "torch",
        "deepspeed",
        "transformers",
        "heavy:",
    ]
    assert lines[-1] == "heavy: set()"


@pytest.mark.parametrize(("words", "completed"), [("infoxlm che", "checkpoint"), ("infoxlm prep ver", "verify")])
def test_the_shell_completes_verbs(words: str, completed: str) -> None:
    environment = {"_INFOXLM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    script = "import sys; sys.argv = ['infoxlm']; from infoxlm_ds.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [completed]


def test_a_shipped_recipe_is_printed_and_a_wrong_name_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, "recipe") == 0 and capsys.readouterr().out.split() == [
        "base",
        "continue",
        "demo",
        "evening",
        "large",
        "xl",
    ]
    assert _run(monkeypatch, "recipe", "base") == 0 and "xlm-roberta-base" in capsys.readouterr().out
    assert _run(monkeypatch, "recipe", "small") == 2 and "choose one of base, continue, demo" in capsys.readouterr().err
