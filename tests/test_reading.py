"""What we read cannot run code, lead elsewhere, or end in a traceback: one line, exit code 2."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_prep.verify import verify
from infoxlm_ds import cli
from infoxlm_ds.atomic import write_file
from infoxlm_ds.cluster.hosts import read_hostfile
from infoxlm_ds.config import UserError
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.manifest import load_manifest
from infoxlm_ds.data.packs import unpack
from infoxlm_ds.data.text import lines
from infoxlm_ds.engine.config import load_engine_config
from infoxlm_ds.evaluation.embed import SentenceEmbedder
from infoxlm_ds.model.pretrained import init_config
from infoxlm_ds.reading import load_recipe, parse_yaml, read_yaml
from tests.corpus import ROOT, small_recipe

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"b{i}: &b{i} [{', '.join(['*a'] * 9)}]\n" for i in range(30))


@pytest.mark.parametrize(
    "text",
    [
        "seed: 2024-02-30",
        "seed: 0x_",
        "seed: " + "9" * 5000,
        "seed: " + "[" * 5000,
        'seed: "a\0b"',
        "optimizer: {steps: 3}\noptimizer: {steps: 4}",
        "? [1]\n: 2",
        "a: !!python/object/apply:os.system [ls]",
        "seed: [",
        "\ud800",
        BOMB,
    ],
    ids=lambda text: text[:12].encode("ascii", "replace").decode(),
)
def test_yaml_that_is_none_is_told_in_one_short_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_yaml(text)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"recipe\.yaml: not valid YAML"):
        read_yaml(path, "recipe")


def test_aliases_stand_for_values_but_not_for_other_aliases() -> None:
    """As a program writes them that dumps a value twice."""
    assert parse_yaml("a: &x {b: [1]}\nc: *x\nd: [*x, *x]") == {"a": {"b": [1]}, "c": {"b": [1]}, "d": [{"b": [1]}] * 2}
    with pytest.raises(ValueError, match="alias must not stand for other aliases"):
        parse_yaml("a: &x [1]\nb: &y [*x]")


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_end_in_anything_but_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    for read in (load_recipe, load_engine_config, read_hostfile):
        try:
            read(path)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000


WRONG: dict[str, list[object]] = {
    "optimizer.eps": [-1, 0, float("nan")],
    "timeout.step": [10**15],
    "seed": [10**20, -1],
    "model.width": [10**9],
    "model.layers": [10**5],
    "batch.lanes": [10**9],
    "batch.mmlm_tokens": [10**9],
    "masking": [{"mask": 0.9, "random": 0.9}, {"probability": 0}],
    "contrast.temperature": [1e-30, float("inf")],
    "weights.xlco": [float("inf")],
    "model": [3, "x" * 10**6],
    "optimizer.steps": ["x" * 10**6],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_value_that_cannot_work_is_refused_with_its_key(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(UserError) as caught:
        small_recipe(tmp_path / "corpus", tmp_path / "run", f"{key}={json.dumps(value)}".replace("Infinity", ".inf"))
    message = str(caught.value)
    assert key.split(".")[-1] in message and len(message) < 800 and "\n" not in message


@pytest.mark.parametrize(
    "config",
    [
        {"comms_logger": 5},
        {"communication_data_type": "nonsense"},
        {"data_types": {"grad_accum_dtype": "int3"}},
        {"wall_clock_breakdown": "x"},
        {"zero_optimization": {"stage": 1, "legacy_stage1": True}},
        {"zero_optimization": {"stage": "x"}},
        {"zero_optimization": {"stage": 3, "offload_param": 5}},
        {"bf16": {"enabled": "perhaps"}},
        {"bf16": 1},
        [],
    ],
    ids=str,
)
def test_an_engine_configuration_that_deepspeed_refuses_is_told_before_the_launch(
    tmp_path: Path, config: object
) -> None:
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"engine\.json"):
        load_engine_config(path)


@pytest.mark.parametrize("data", ["{}".encode("utf-16"), b"\xff\xfe\x00", b"[" * 100_000, b""])
def test_engine_and_host_files_that_are_no_text_are_told(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    for read in (load_engine_config, read_hostfile):
        for path in (tmp_path / "file", tmp_path, tmp_path / "file" / "below"):
            with pytest.raises(UserError) as caught:
                read(path)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config", [{"\n": 1}, {"zero_optimization": {"0\n": 1}}, {"zero_optimization": {"stage": "\n"}}]
)
def test_a_message_is_one_line_whatever_the_user_wrote(tmp_path: Path, config: dict[str, object]) -> None:
    (tmp_path / "engine.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"\\n") as caught:
        load_engine_config(tmp_path / "engine.json")
    assert "\n" not in str(caught.value)


def test_a_mark_of_the_byte_order_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("\ufeffone\n\ufefftwo\n".encode())
    assert list(lines(path)) == [(1, "one"), (2, "\ufefftwo")]


def _rehashed(corpus: Path, name: str) -> None:
    """Let the manifest say that its first shard has another name."""
    manifest = load_manifest(corpus)
    (source, *others) = manifest.sources
    (shard, *more) = source.shards
    changed = source.model_copy(update={"shards": (shard.model_copy(update={"name": name}), *more)})
    (corpus / "manifest.json").write_text(manifest.model_copy(update={"sources": (changed, *others)}).render())


@pytest.mark.parametrize("how", ["above", "absolute", "link"])
def test_a_manifest_cannot_name_files_outside_its_folder(corpus: Path, tmp_path: Path, how: str) -> None:
    copy = tmp_path / "copy"
    copy.symlink_to(tmp_path / "real")  # the corpus itself may be a link
    (tmp_path / "real").mkdir()
    for path in corpus.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(corpus)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    Corpus(copy)
    shard = load_manifest(copy).sources[0].shards[0].name
    outside = tmp_path / "outside.tar"
    outside.write_bytes((copy / shard).read_bytes())
    if how == "link":
        (copy / shard).unlink()
        (copy / shard).symlink_to(outside)
    else:
        _rehashed(copy, "../outside.tar" if how == "above" else str(outside))
    with pytest.raises(UserError, match="leads out of"):
        Corpus(copy)
    if how == "link":  # the others are files that are missing
        with pytest.raises(UserError, match="leads out of"):
            verify(copy)


@pytest.mark.parametrize("harm", ["flip", "zero"])
def test_a_damaged_tokenizer_does_not_train(corpus: Path, tmp_path: Path, harm: str) -> None:
    copy = tmp_path / "corpus"
    for path in corpus.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(corpus)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(corpus)).write_bytes(path.read_bytes())
    tokenizer = copy / "tokenizer" / "tokenizer.json"
    data = bytearray(tokenizer.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2) if harm == "zero" else data[len(data) // 2 :]
    data[len(data) // 3] ^= 1
    tokenizer.write_bytes(data)
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
        Corpus(copy)


def test_a_pack_is_never_unpickled(tmp_path: Path) -> None:
    """A tar with a right checksum whose arrays are pickled objects."""
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"code": 1}], dtype=object), allow_pickle=True)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("0.ids.npy", "0.len.npy", "0.tid.npy"):
            info = tarfile.TarInfo(name)
            info.size = len(pickled.getvalue())
            tar.addfile(info, io.BytesIO(pickled.getvalue()))
    data = (tmp_path / "x.tar").read_bytes()
    with pytest.raises(ValueError, match="allow_pickle=False"):
        unpack(data, 1, 1)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_file(tmp_path / "folder", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_tokenizer_with_more_pieces_than_the_model_is_refused(model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"gives ids up to .* but the model has"):
        SentenceEmbedder(folder)


def test_a_private_file_is_the_users_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_file(tmp_path / "env", "TOKEN=x\n", private=True)
    finally:
        os.umask(before)
    assert (tmp_path / "env").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EROFS, errno.ENOTDIR])
def test_what_the_system_refuses_is_one_line_with_the_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def refuse(standalone_mode: bool) -> None:
        raise OSError(number, os.strerror(number), "/some/where")

    monkeypatch.setattr(cli, "app", refuse)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1 and line.startswith(f"infoxlm: /some/where: {os.strerror(number)}")


def test_plan_writes_below_a_file_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    target = str(tmp_path / "file" / "plan.json")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["infoxlm", "plan", "recipes/demo.yaml", "--gpus", "2", "--json", target])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1 and str(tmp_path / "file") in capsys.readouterr().err


def test_code_beside_a_model_is_not_run(model_folder: Path, tmp_path: Path) -> None:
    """transformers would run the class that `auto_map` names, or ask whether to."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Any: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        tree = json.loads((folder / name).read_text())
        names = ("AutoConfig", "AutoModel", "AutoModelForMaskedLM", "AutoTokenizer")
        tree["auto_map"] = dict.fromkeys(names, "code.Any") | {"AutoTokenizer": ["code.Any", None]}
        (folder / name).write_text(json.dumps(tree))
    SentenceEmbedder(folder)
    init_config(str(folder))
    assert not ran.exists()
