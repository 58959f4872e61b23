"""A corpus on a server gives the same batches as its folder; what goes wrong on the way is seen, and tried again a few
times."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_prep.cli import app
from data_prep.verify import verify
from infoxlm_ds.cluster.doctor.agent import read_corpus
from infoxlm_ds.config import Place, UserError, place
from infoxlm_ds.data import store
from infoxlm_ds.data.batch import BatchBuilder
from infoxlm_ds.data.cache import Cache
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.files import File
from infoxlm_ds.data.manifest import NAME, load_manifest
from infoxlm_ds.data.stream import StreamReader
from infoxlm_ds.planner.workload import read_text
from infoxlm_ds.reading import load_recipe
from tests.corpus import ROOT, small_recipe
from tests.data.servers import HttpFolder, http_folder
from tests.data.test_stream import mixture

TRIES = len(store.WAITS) + 1


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INFOXLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("INFOXLM_CACHE_GB", raising=False)
    monkeypatch.setattr(store, "WAITS", (0.001,) * len(store.WAITS))
    return tmp_path / "cache"


@pytest.fixture
def server(corpus: Path) -> Iterator[HttpFolder]:
    pytest.importorskip("obstore")
    with http_folder(corpus) as running:
        yield running


@pytest.fixture
def changeable(corpus: Path, tmp_path: Path) -> Iterator[HttpFolder]:
    """A server of a copy of the corpus."""
    pytest.importorskip("obstore")
    shutil.copytree(corpus, tmp_path / "served")
    with http_folder(tmp_path / "served") as running:
        yield running


def batches(corpus: Place, folder: Path, steps: int = 8) -> list[list[int]]:
    """The ids of the batches of two lanes of a training."""
    recipe = small_recipe(Path("unread"), folder / "run", "sampling.window_packs=2", f"corpus={corpus}")
    builder = BatchBuilder(recipe, Corpus(recipe.corpus), [0, 2])
    return [builder.build(lane, step).tokens.ids.tolist() for step in range(steps) for lane in (0, 2)]


def first_pack(corpus: Corpus) -> None:
    corpus.pack.__wrapped__(0, 0)


def test_batches_are_those_of_the_folder(corpus: Path, server: HttpFolder, tmp_path: Path) -> None:
    assert batches(server.url, tmp_path) == batches(corpus, tmp_path)
    assert server.parts()


def test_batches_from_s3_are_those_of_the_folder(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    running = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    variables = {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "REGION": "us-east-1", "ALLOW_HTTP": "true"}
    for name, value in (variables | {"ENDPOINT": f"http://{host}:{port}"}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT"], region_name="us-east-1")
    client.create_bucket(Bucket="bucket")
    for path in corpus.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "bucket", f"texts/small/{path.relative_to(corpus)}")
    try:
        assert batches("s3://bucket/texts/small", tmp_path) == batches(corpus, tmp_path)
        assert verify("s3://bucket/texts/small") == []
        with pytest.raises(UserError, match="s3://bucket/none is no prepared corpus"):
            load_manifest("s3://bucket/none")
    finally:
        running.stop()


@pytest.mark.parametrize("kind", ["500", "drop", "short", "wrong"])
def test_a_fault_that_passes_changes_nothing(corpus: Path, server: HttpFolder, tmp_path: Path, kind: str) -> None:
    server.breaks(kind, times=1)
    assert batches(server.url, tmp_path, steps=2) == batches(corpus, tmp_path, steps=2)


@pytest.mark.parametrize(
    ("kind", "tries", "message"),
    [
        ("500", TRIES, r"nway.*\.tar: bytes 0-\d+ cannot be read in 7 tries: .*500.*check the network"),
        ("drop", TRIES, r"\.tar: bytes 0-\d+ cannot be read in 7 tries"),
        ("short", TRIES, r"bytes 0-\d+ cannot be read in 7 tries: only \d+ of \d+ bytes came"),
        ("wrong", 2, r"http://127.*\.tar: the pack in bytes 0-\d+ is damaged, also when it is read again: upload"),
        ("whole", 1, r"\.tar: bytes 0-\d+ cannot be read: the server sends only whole files .* copy the corpus"),
    ],
)
def test_a_fault_that_stays_is_one_line_after_a_few_tries(
    server: HttpFolder, kind: str, tries: int, message: str
) -> None:
    corpus = Corpus(server.url)
    server.breaks(kind)
    number = next(i for i, source in enumerate(corpus.sources) if source.kind == "nway")
    with pytest.raises(UserError, match=message) as raised:
        corpus.pack(number, 0)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
    assert len(server.parts()) == tries


def test_a_server_that_sends_only_whole_files_is_refused_at_the_start(server: HttpFolder) -> None:
    server.breaks("whole")
    server.fault = lambda path: "whole"  # type: ignore[method-assign]
    with pytest.raises(UserError, match="sends only whole files"):
        Corpus(server.url)


def test_what_is_missing_is_named(changeable: HttpFolder, tmp_path: Path) -> None:
    shard = load_manifest(tmp_path / "served").sources[0].shards[0].name
    (tmp_path / "served" / shard).unlink()
    with pytest.raises(UserError, match=rf"{changeable.url}/{shard} is missing: upload it"):
        Corpus(changeable.url)
    with pytest.raises(UserError, match=rf"{shard} is missing"):
        first_pack(Corpus(changeable.url, look_at_files=False))
    (tmp_path / "served" / shard).write_bytes(b"short")
    with pytest.raises(UserError, match="has 5 bytes, not"):
        Corpus(changeable.url)
    (tmp_path / "served" / NAME).unlink()
    with pytest.raises(UserError, match=r"is no prepared corpus: .* and upload the folder"):
        load_manifest(changeable.url)


def test_a_server_that_does_not_answer_is_one_line() -> None:
    pytest.importorskip("obstore")
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/x/manifest\.json: the file cannot be read in 7 tries"):
        load_manifest("http://127.0.0.1:9/x")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "http://other/x", "a//x", "a\\x", "..", "./x"])
def test_a_name_cannot_lead_out_of_a_url(server: HttpFolder, name: str) -> None:
    file = File(name=name, bytes=3, sha256="0" * 64)
    with pytest.raises(UserError, match="names a file outside the corpus"):
        store.open_store(server.url).check([file])
    with pytest.raises(UserError, match="names a file outside the corpus"):
        store.open_store(server.url).read(store.Range(file, 0, 3, 0))


@pytest.mark.parametrize("url", ["ftp://host/x", "s3://", "https://host/x?key=1", "https://me:word@host/x"])
def test_other_urls_are_mistakes_of_the_recipe(tmp_path: Path, url: str) -> None:
    path = tmp_path / "run.yaml"
    small_recipe(tmp_path, tmp_path / "run")
    with pytest.raises(UserError, match=r"run\.yaml: corpus: a URL begins with one of http"):
        load_recipe(path, [f"corpus='{url}'"])
    with pytest.raises(UserError, match=r"run\.yaml: corpus: give a folder or a URL \(got 5\)"):
        load_recipe(path, ["corpus=5"])


def test_a_url_stays_as_it_is_and_a_folder_is_a_path(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, tmp_path / "run", "corpus=s3://bucket/my-corpus/")
    assert recipe.corpus == "s3://bucket/my-corpus" == recipe.model_dump(mode="json")["corpus"]
    assert place("a/../b") == Path("a/../b")


def test_packs_near_each_other_are_one_request(corpus: Path, server: HttpFolder) -> None:
    remote = Corpus(server.url)
    number = max(range(len(remote.sources)), key=lambda i: remote.sources[i].packs)
    packs = [(number, i) for i in range(remote.sources[number].packs)]
    assert len(packs) > 1
    server.requests.clear()
    first, again = remote.ahead(packs), remote.ahead(packs)
    assert len(first) == 1 and again[0] is first[0]
    local = Corpus(corpus)
    for pack in packs:
        assert remote.pack(*pack).ids.tolist() == local.pack(*pack).ids.tolist()
    assert len(server.parts()) == 1
    assert local.ahead(packs) == []


def test_the_next_window_is_read_ahead(changeable: HttpFolder) -> None:
    """It is there though the server fails from then on."""
    corpus = Corpus(changeable.url)
    shares = mixture(corpus, "xlco", 1.0, {})
    reader = StreamReader(corpus, "xlco", seed=1, mixture=shares, lanes=1, window_packs=1, own_lanes=[0])
    first = reader.take(0, items=1)
    wait(reader._next[0])  # type: ignore[arg-type]
    changeable.breaks("500")
    left = len(reader._windows[0][1]) - len(first)
    assert len(reader.take(0, items=left + 1)) == left + 1


def test_what_could_not_be_read_ahead_is_read_when_it_is_needed(corpus: Path, server: HttpFolder) -> None:
    remote = Corpus(server.url)
    server.breaks("500", times=TRIES)
    held = remote.ahead([(0, 0)])
    wait(held)
    assert held[0].exception()
    assert remote.pack(0, 0).ids.tolist() == Corpus(corpus).pack(0, 0).ids.tolist()


def test_groups_end_at_gaps_and_shards_and_where_they_are_long() -> None:
    one, two = (File(name=name, bytes=10**9, sha256="0" * 64) for name in ("a.tar", "b.tar"))
    ranges = [store.Range(one, offset, 100, 0) for offset in (0, 100, 200 + store.NEAR, 500 + 2 * store.NEAR)]
    other = store.Range(two, 0, 100, 0)
    assert list(store._joined([other, *reversed(ranges), ranges[0]])) == [ranges[:3], ranges[3:], [other]]
    close = [store.Range(one, offset, store.PIECE // 2, 0) for offset in range(0, 2 * store.PIECE, store.PIECE // 2)]
    assert list(store._joined(close)) == [close[:2], close[2:]]


def test_commands_take_a_url(corpus: Path, server: HttpFolder, tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["verify", server.url]).output == f"{server.url}: every file is as it was written\n"
    shown = [CliRunner().invoke(app, ["stat", str(where)]) for where in (corpus, server.url)]
    assert shown[0].output == shown[1].output and shown[1].exit_code == 0
    manifest = load_manifest(corpus)
    assert read_corpus(server.url, 0, 1, 60) == read_corpus(str(corpus), 0, 1, 60)
    recipe = small_recipe(corpus, tmp_path / "run", f"corpus={server.url}")
    assert str(manifest.tokenizer.vocab_size) in read_text(recipe).notes[0]
    assert (
        "there is no corpus at" in read_text(small_recipe(corpus, tmp_path / "run", f"corpus={server.url}/x")).notes[1]
    )


def test_verify_finds_what_differs_on_a_server(changeable: HttpFolder, tmp_path: Path) -> None:
    path = next((tmp_path / "served").rglob("*.tar"))
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    (problem,) = verify(changeable.url)
    assert problem.endswith(f"{path.name}: differs from what was written")


def test_a_damaged_copy_of_a_small_file_is_fetched_again(server: HttpFolder, own_cache: Path) -> None:
    fetched = Corpus(server.url).tokenizer
    assert fetched.is_relative_to(own_cache)
    server.requests.clear()
    Corpus(server.url)
    assert [part for _, part in server.parts("")] == ["bytes=0-0"]  # whether the server can send parts
    next(own_cache.rglob("*.npy")).write_bytes(b"damaged")
    (fetched / "tokenizer.json").write_text("{}")
    Corpus(server.url)
    assert [len(server.parts(name)) for name in (".npy", "tokenizer.json")] == [1, 3]


def test_whole_shards_are_kept_read_from_there_and_fetched_again_if_damaged(
    corpus: Path, server: HttpFolder, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFOXLM_CACHE_GB", "1")
    expected = batches(corpus, tmp_path)
    assert batches(server.url, tmp_path) == expected
    shards = list((own_cache / "shards").glob("*.tar"))
    assert shards
    server.requests.clear()
    assert batches(server.url, tmp_path) == expected
    assert server.parts() == []
    shards[0].write_bytes(bytes(shards[0].stat().st_size))
    assert batches(server.url, tmp_path) == expected
    assert len(server.parts()) == 1


def test_two_processes_fetch_a_shard_once(server: HttpFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFOXLM_CACHE_GB", "1")
    code = "import sys; from infoxlm_ds.data.corpus import Corpus; Corpus(sys.argv[1], False).pack(0, 0)"
    readers = [subprocess.Popen([sys.executable, "-c", code, server.url], cwd=ROOT) for _ in range(2)]
    assert [reader.wait() for reader in readers] == [0, 0]
    assert len(server.parts()) == 1


def test_the_kept_shards_stay_within_the_limit_and_the_longest_unused_go(tmp_path: Path) -> None:
    content = {str(i): bytes([i]) * 100 for i in range(4)}
    files = [File(name=name, bytes=100, sha256=hashlib.sha256(data).hexdigest()) for name, data in content.items()]
    fetched: list[str] = []

    def fetch(file: File) -> Iterator[bytes]:
        fetched.append(file.name)
        yield content[file.name][:60]
        assert sum(path.stat().st_size for path in (tmp_path / "shards").iterdir()) <= 250
        yield content[file.name][60:]

    cache = Cache(tmp_path, 250)

    def read(number: int) -> None:
        assert cache.shard(files[number], 10, 5, fetch, "url") == bytes([number]) * 5

    def age() -> None:
        for path in (tmp_path / "shards").glob("*.tar"):
            os.utime(path, (path.stat().st_mtime - 10,) * 2)

    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "killed.tar.partial").write_bytes(bytes(100))
    for number in (0, 1, 0, 2, 0, 1):
        age()
        read(number)
    assert fetched == ["0", "1", "2", "1"]  # 1 made room for 2, then 2 for 1
    large = File(name="large", bytes=251, sha256="0" * 64)
    assert cache.shard(large, 0, 5, fetch, "url") is None


def test_a_shard_with_another_hash_is_not_kept(
    changeable: HttpFolder, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFOXLM_CACHE_GB", "1")
    changeable.breaks("wrong")
    with pytest.raises(UserError, match=r"\.tar is damaged: upload it again"):
        first_pack(Corpus(changeable.url, look_at_files=False))
    assert len(changeable.parts()) == 2 and list((own_cache / "shards").iterdir()) == []


@pytest.mark.parametrize("value", ["much", "-1", "nan", "inf"])
def test_a_wrong_limit_is_a_mistake(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("INFOXLM_CACHE_GB", value)
    with pytest.raises(UserError, match="set it to a number of gigabytes"):
        Cache.of_environment()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    file = File(name="x", bytes=3, sha256="0" * 64)
    with pytest.raises(UserError, match="set INFOXLM_CACHE to a folder"):
        Cache(tmp_path / "file" / "below", 10).shard(file, 0, 3, lambda file: [b""], "url")


def test_without_obstore_a_url_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UserError, match=r"pip install 'infoxlm-ds\[remote\]'"):
        load_manifest("s3://bucket/x")
