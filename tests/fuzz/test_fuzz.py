"""Made-up recipes, engine files, corpus descriptions and damaged files: each is read, or refused by one line.

`make test` tries some, `make fuzz` many (`--fuzz`). Pin a case that failed in tests/test_reading.py.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_prep.description import load_description
from infoxlm_ds.build import check_inputs
from infoxlm_ds.checkpoint.checkpoints import Checkpoints
from infoxlm_ds.checkpoint.fragments import Index
from infoxlm_ds.checkpoint.store import Store, damage_of
from infoxlm_ds.checkpoint.weights import Weights, undamaged
from infoxlm_ds.cluster.hosts import read_hostfile
from infoxlm_ds.config import Log, UserError
from infoxlm_ds.data.batch import BatchBuilder
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.engine.config import load_engine_config
from infoxlm_ds.evaluation.embed import SentenceEmbedder
from infoxlm_ds.evaluation.finetune.squad import languages_of_questions, questions
from infoxlm_ds.evaluation.finetune.windows import windows_of
from infoxlm_ds.model.checksums import write_checksums
from infoxlm_ds.monitor.sinks import Sinks
from infoxlm_ds.reading import load_recipe
from tests.corpus import ROOT, small_recipe
from tests.distributed.ranks import run_ranks
from tests.distributed.test_checkpoint import stop_after_two
from tests.integration.commands import infoxlm_here

NASTY: list[Any] = [None, True, "", "x", "0", "../..", "/", "\0", "\n", "é" * 50, -1, 0, 1, 2**31, 2**63, 10**30]
NASTY += [0.5, -0.0, 1e308, float("nan"), float("inf"), [], [[]], {}, {"": ""}, {"a": [1, {"b": None}]}]
values = st.one_of(
    st.sampled_from(NASTY),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
)


Fuzz = Callable[[int], settings]


@pytest.fixture(scope="module")
def fuzz(request: pytest.FixtureRequest) -> Fuzz:
    """Settings for so many examples, times `--fuzz`. Each may take ten seconds."""
    times, quiet = request.config.getoption("fuzz"), list(HealthCheck)
    return lambda n: settings(max_examples=n * times, deadline=10_000, suppress_health_check=quiet, database=None)


def _one_line(job: Callable[[], object]) -> bool:
    """Run a job. Whether it was done; a refusal must be one line."""
    try:
        job()
    except UserError as error:
        message = str(error)
        assert "\n" not in message.strip() and 0 < len(message) < 3000, message
        return False
    return True


def _paths(tree: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if not isinstance(tree, dict | list) or not tree:
        return [prefix]
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return [prefix, *(path for key, below in pairs for path in _paths(below, (*prefix, key)))][:500]


def _changed(tree: Any, changes: list[tuple[int, str, Any]]) -> Any:
    """A copy with some values replaced, removed or added."""
    tree = copy.deepcopy(tree)
    for number, how, given_value in changes:
        value = copy.deepcopy(given_value)
        paths = [path for path in _paths(tree) if path]
        if not paths:
            return value
        *above, last = paths[number % len(paths)]
        place = tree
        for key in above:
            place = place[key]
        if how == "replace":
            place[last] = value
        elif how == "remove":
            del place[last]
        elif isinstance(place, dict):
            place[str(value)[:20]] = value
    return tree


changes = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(["replace", "replace", "replace", "remove", "add"]), values),
    min_size=1,
    max_size=3,
)


def test_no_recipe_ends_in_a_traceback(corpus: Path, tmp_path: Path, fuzz: Fuzz) -> None:
    small_recipe(corpus, tmp_path / "run")
    path = tmp_path / "run.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["probe"] = {"data": str(ROOT / "data_prep/embedded/home_assistant.dev.jsonl.xz"), "languages": ["de"]}
    tree["resume"] = {"allow_change": ["optimizer"]}

    @fuzz(60)
    @given(changes)
    def run(made: list[tuple[int, str, Any]]) -> None:
        path.write_text(yaml.safe_dump(_changed(tree, made)), encoding="utf-8")
        _one_line(lambda: check_inputs(load_recipe(path), 0, 2))

    run()
    assert not (tmp_path / "run").exists()


def test_no_override_ends_in_a_traceback(corpus: Path, tmp_path: Path, fuzz: Fuzz) -> None:
    small_recipe(corpus, tmp_path / "run")
    keys = [
        "optimizer.eps",
        "model.width",
        "contrast.momentum",
        "batch",
        "seed",
        "a.b",
        "",
        ".",
        "corpus",
        "probe.data",
    ]

    @fuzz(100)
    @given(st.sampled_from(keys), st.text(max_size=30) | values.map(str))
    def run(key: str, text: str) -> None:
        _one_line(lambda: load_recipe(tmp_path / "run.yaml", [f"{key}={text}"]))

    run()


def test_no_engine_file_ends_in_a_traceback(tmp_path: Path, fuzz: Fuzz) -> None:
    trees = [json.loads(path.read_text()) for path in sorted((ROOT / "ds_configs").glob("*.json"))]
    everything: dict[str, Any] = {"communication_data_type": "fp32", "wall_clock_breakdown": False}
    everything |= {"comms_logger": {"enabled": False}}
    path = tmp_path / "engine.json"

    @fuzz(100)
    @given(st.sampled_from(trees), changes)
    def run(tree: dict[str, Any], made: list[tuple[int, str, Any]]) -> None:
        path.write_text(json.dumps(_changed(everything | tree, made)), encoding="utf-8")
        _one_line(lambda: load_engine_config(path))

    run()


def test_no_file_of_questions_ends_in_a_traceback(model_folder: Path, tmp_path: Path, fuzz: Fuzz) -> None:
    tokenizer, path = AutoTokenizer.from_pretrained(model_folder), tmp_path / "test.json"
    answers = [{"text": "lamp", "answer_start": 4}, {"text": "The lamp", "answer_start": 0}]
    asked = {"id": "english-1", "question": "What is on?", "answers": answers}
    tree = {"version": "1.1", "data": [{"paragraphs": [{"context": "The lamp is on.", "qas": [asked]}]}]}

    @fuzz(100)
    @given(changes)
    def run(made: list[tuple[int, str, Any]]) -> None:
        path.write_text(json.dumps(_changed(tree, made)), encoding="utf-8")
        _one_line(lambda: languages_of_questions(path))
        _one_line(lambda: windows_of(list(questions(path, None)), tokenizer, 34))

    run()


def test_no_corpus_description_ends_in_a_traceback(tmp_path: Path, fuzz: Fuzz) -> None:
    tree = yaml.safe_load((ROOT / "data_prep" / "embedded" / "corpus.yaml").read_text(encoding="utf-8"))
    path = tmp_path / "corpus.yaml"

    @fuzz(100)
    @given(changes)
    def run(made: list[tuple[int, str, Any]]) -> None:
        path.write_text(yaml.safe_dump(_changed(tree, made)), encoding="utf-8")
        _one_line(lambda: load_description(path))

    run()


damages = st.tuples(
    st.sampled_from(["flip", "cut", "zero", "more", "empty", "text"]), st.floats(0, 1), st.integers(0, 7)
)


def _harmed(data: bytes, damage: tuple[str, float, int]) -> bytes:
    kind, where, bit = damage
    at = min(int(where * len(data)), max(0, len(data) - 1))
    match kind:
        case "flip":
            return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :] if data else b"\0"
        case "cut":
            return data[:at]
        case "zero":
            return data[:at] + bytes(len(data) - at)
        case "more":
            return data + b"\0" * (bit + 1)
        case "empty":
            return b""
    return b"no such file\n"


def test_a_damaged_corpus_is_refused_or_read_as_it_was(corpus: Path, tmp_path: Path, fuzz: Fuzz) -> None:
    """Every kind of file. The same batch comes out, or one line."""
    copied = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    recipe = small_recipe(copied, tmp_path / "run")
    files = sorted(path for path in copied.rglob("*") if path.is_file())

    def read() -> bytes:
        check_inputs(recipe, 0, 1)
        builder = BatchBuilder(recipe, Corpus(copied), [0])
        return b"".join(builder.build(0, step).tokens.ids.numpy().tobytes() for step in range(3))

    whole = read()

    @fuzz(40)
    @given(st.sampled_from(files), damages)
    def run(path: Path, damage: tuple[str, float, int]) -> None:
        before = path.read_bytes()
        path.write_bytes(_harmed(before, damage))
        try:
            got: list[bytes] = []
            if _one_line(lambda: got.append(read())):
                assert got == [whole], f"{path.name} was damaged and read as something else"
        finally:
            path.write_bytes(before)

    run()


def _weights(checkpoint: Path) -> dict[str, bytes]:
    weights = Weights(checkpoint)
    return {name: weights[name].numpy().tobytes() for name in weights}


def test_a_damaged_checkpoint_is_refused_or_read_as_it_was(corpus: Path, tmp_path: Path, fuzz: Fuzz) -> None:
    recipe = small_recipe(corpus, tmp_path / "run")
    run_ranks(stop_after_two, 2, recipe)
    folder = Store(recipe.run).at()
    files = [*sorted(folder.iterdir()), recipe.run / "checkpoints" / "latest", recipe.run / "metrics.jsonl"]
    (recipe.run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    weights = _weights(folder)
    whole = {path: path.read_bytes() for path in files}

    def read() -> dict[str, bytes]:
        Checkpoints(recipe)
        check_inputs(recipe, 0, 2)
        path = undamaged(recipe.run)
        assert path == folder or whole[files[-2]] != files[-2].read_bytes()
        Index.read(path)
        return _weights(path)

    @fuzz(60)
    @given(st.sampled_from(files), damages)
    def run(path: Path, damage: tuple[str, float, int]) -> None:
        path.write_bytes(_harmed(whole[path], damage))
        try:
            Sinks(recipe.run, 1, 9, Log(tensorboard=False)).__exit__(None, None, None)
            got: list[dict[str, bytes]] = []
            if _one_line(lambda: got.append(read())) and path.parent == folder:
                assert got == [weights], f"{path.name} was damaged and read as something else"
        finally:
            path.write_bytes(whole[path])
            for kept in recipe.run.rglob("*.damaged-*"):
                kept.unlink()

    run()
    assert damage_of(folder) == ""


def test_no_hostfile_ends_in_a_traceback(tmp_path: Path, fuzz: Fuzz) -> None:
    path = tmp_path / "hostfile"
    words = st.sampled_from(["node-1", "slots=2", "slots=0", "slots=", "=", "#", " ", "\t", "\n", "\r", "user@h", "1"])

    @fuzz(100)
    @given(st.lists(words | st.text(max_size=5), max_size=12).map("".join), st.none() | damages)
    def run(text: str, damage: tuple[str, float, int] | None) -> None:
        data = text.encode(errors="surrogatepass")
        path.write_bytes(data if damage is None else _harmed(data, damage))
        _one_line(lambda: read_hostfile(path))

    run()


@pytest.mark.parametrize("hashes", [True, False])
def test_a_damaged_model_folder_is_refused_or_read_as_it_was(
    model_folder: Path, corpus: Path, tmp_path: Path, fuzz: Fuzz, hashes: bool
) -> None:
    """Without hashes, as in folders of others, damaged weights load; nothing ends in a traceback."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    if hashes:
        write_checksums(folder)
    recipe = small_recipe(corpus, tmp_path / "run", f"model.init={folder}")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    whole = SentenceEmbedder(folder).embed(["a lamp", "лампа"])

    @fuzz(30)
    @given(st.sampled_from(files), damages)
    def run(path: Path, damage: tuple[str, float, int]) -> None:
        before = path.read_bytes()
        path.write_bytes(_harmed(before, damage))
        try:
            _one_line(lambda: check_inputs(recipe, 0, 1))
            got: list[np.ndarray] = []
            if _one_line(lambda: got.append(SentenceEmbedder(folder).embed(["a lamp", "лампа"]))) and hashes:
                assert np.array_equal(got[0], whole), f"{path.name} was damaged and read as something else"
        finally:
            path.write_bytes(before)

    run()


COMMANDS = [
    "plan {} --gpus 2",
    "plan {} --gpus 2 --json {}",
    "export {} {}",
    "checkpoint list {}",
    "checkpoint verify {}",
    "checkpoint consolidate {} {}",
    "checkpoint prune {} --dry-run",
    "eval retrieval --model {} --data {} --min-pairs 2",
    "eval compare {} {}",
    "prep build {} {}",
    "prep verify {}",
    "prep stat {}",
]


def test_no_command_line_ends_in_a_traceback(
    corpus: Path, model_folder: Path, tmp_path: Path, fuzz: Fuzz, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every command with every kind of path in every place."""
    run_ranks(stop_after_two, 1, small_recipe(corpus, tmp_path / "run"))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\0\1" * 20)
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"text": {"en": "a", "de": "b"}}\n' * 3)
    (tmp_path / "rows.json").write_text("[1, {}]")
    places = [corpus, model_folder, ROOT / "data_prep" / "embedded" / "corpus.yaml", Path("/"), Path("/dev/null")]
    places += [tmp_path / name for name in ("run", "run.yaml", "bytes", "empty", "rows.jsonl", "rows.json", "gone")]
    places += [tmp_path / "bytes" / "below", tmp_path / "a" / "b", Path("/proc/version"), Path("x" * 300), Path()]
    targets = [tmp_path / "out", tmp_path / "bytes", tmp_path / "empty", Path("/proc")]

    @fuzz(60)
    @given(st.sampled_from(COMMANDS), st.lists(st.sampled_from(places), min_size=2, max_size=2), st.integers(0, 10**9))
    def run(command: str, paths: list[Path], number: int) -> None:
        words = command.split()
        if command.startswith(("export", "checkpoint consolidate", "prep build")) or "--json" in command:
            paths[1] = targets[number % 4] / str(number)
            if paths[0].suffix == ".yaml" and "prep" in command:  # it would work, and take minutes
                return
        filled = [str(paths.pop(0)) if word == "{}" else word for word in words]
        done = infoxlm_here(*filled)
        said = done.stderr + capfd.readouterr().err
        assert done.returncode in (0, 1, 2), (filled, said)
        assert "Traceback" not in said, (filled, said)
        if done.returncode == 2:
            assert said.strip() and len([line for line in said.splitlines() if line.startswith("infoxlm: ")]) <= 1
        assert not list(tmp_path.rglob("*.partial"))

    run()
