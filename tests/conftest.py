"""One thread, no model hub and, except for tests on a GPU, the CPU as DeepSpeed's device, for this process and all that
it starts."""

import os
import subprocess
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

# A fork inherits the locks of OpenMP's threads but not the threads: with more than one, a rank can wait for ever.
torch.set_num_threads(1)

# Tests with these marks run only where `-m` names the mark.
ASKED_FOR = ("torture", "release")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=5, help="how often test_torture.py kills a run")
    parser.addoption("--fuzz", type=int, default=1, help="how many times as many made-up inputs test_fuzz.py tries")
    parser.addoption("--device", default="cuda", help="where tests marked gpu run; cpu checks all but the kernels")
    parser.addoption("--no-skip", action="append", default=[], metavar="MARK", help="fail where such a test is skipped")


def pytest_configure(config: pytest.Config) -> None:
    """Choose DeepSpeed's device, before a test imports it."""
    if _tests_a_gpu(config) and config.getoption("device") == "cuda":
        os.environ.setdefault("DS_ACCELERATOR", "cuda")
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Nothing is compiled on a CPU, but DeepSpeed decorates an optimizer with torch.compile, whose import takes over a
    # second.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def _tests_a_gpu(config: pytest.Config) -> bool:
    """Whether the tests marked gpu were asked for and can run."""
    asked = config.getoption("markexpr") == "gpu"
    return asked and (torch.cuda.is_available() or config.getoption("device") == "cpu")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and any(mark in item.keywords for mark in item.config.getoption("no_skip")):
        report.outcome, report.longrepr = "failed", f"skipped, which is not allowed here: {report.longreprtext}"
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for mark in ASKED_FOR:
        if mark not in config.getoption("markexpr"):
            config.hook.pytest_deselected(items=[item for item in items if mark in item.keywords])
            items[:] = [item for item in items if mark not in item.keywords]
    if _tests_a_gpu(config):
        return
    # Files with slow tests first: at the end, no worker has a long file alone.
    long = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in long)
    for item in items:
        if item.get_closest_marker("gpu") is not None:  # a folder may have this name
            item.add_marker(pytest.mark.skip(reason="needs a GPU and a process of its own: pytest -m gpu"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from the user's cache, and nothing stays in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test marked gpu runs."""
    return torch.device(request.config.getoption("device"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny XLM-R with its tokenizer, see tests/evaluation/tiny_xlmr.py. Read-only."""
    from tests.evaluation.tiny_xlmr import write_tiny_xlmr

    folder = tmp_path_factory.mktemp("model")
    write_tiny_xlmr(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus of real text in five languages, prepared by data_prep. Read-only."""
    from tests.corpus import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def corpus_with_negatives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `corpus`, and two of three rows have hard negatives. Read-only."""
    from tests.corpus import write_corpus

    return write_corpus(tmp_path_factory.mktemp("negatives"), negatives=True)


@pytest.fixture
def fp16_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed refuses fp16 on a CPU, where it computes right but slowly: enough to check numbers."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)


HubCache = Callable[[str], Path]


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubCache:
    """Gives the folder where a model of this name lies in the hub's cache, as a download would have left it."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def folder(name: str) -> Path:
        model = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (model / "refs").mkdir(parents=True)
        (model / "refs" / "main").write_text("abc")
        (model / "snapshots" / "abc").mkdir(parents=True)
        return model / "snapshots" / "abc"

    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own."""
    folder = tmp_path / "run"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)
