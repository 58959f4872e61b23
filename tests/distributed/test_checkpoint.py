"""What `latest` names is whole, a run folder belongs to one run and one process, and what went wrong is said."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from infoxlm_ds import dist
from infoxlm_ds.build import agreed_inputs, build, check_inputs
from infoxlm_ds.checkpoint.checkpoints import Checkpoints
from infoxlm_ds.checkpoint.consolidate import consolidate
from infoxlm_ds.checkpoint.store import Store, damage_of, read_state
from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.data.files import sha256_of
from infoxlm_ds.engine.ranks import start_ranks
from infoxlm_ds.publish.export import export
from infoxlm_ds.trainer import SaveFailed, fit, save, train_step
from tests.corpus import small_recipe
from tests.distributed.masters import whole_state
from tests.distributed.ranks import run_ranks


def _refused(rank: int, world: int, recipe: Recipe) -> str:
    start_ranks()
    with pytest.raises(UserError) as caught:
        build(agreed_inputs(recipe))
    return str(caught.value)


def _fit(rank: int, world: int, recipe: Recipe) -> dict[str, Tensor]:
    start_ranks()
    state = build(agreed_inputs(recipe))
    fit(state, None)
    state.loader.close()
    return whole_state(state)


def stop_after_two(rank: int, world: int, recipe: Recipe) -> None:
    """Two of six steps, both saved."""
    start_ranks()
    state = build(agreed_inputs(recipe))
    for _ in range(2):
        train_step(state)
        save(state, None)
    state.loader.close()


@pytest.fixture(scope="module")
def stopped(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("stopped") / "run"
    run_ranks(stop_after_two, 2, small_recipe(corpus, run))
    return run


@pytest.fixture
def half_way(stopped: Path, tmp_path: Path) -> Path:
    """A run folder with the committed checkpoints of steps 1 and 2."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The end of the run that was never stopped."""
    whole: dict[str, Tensor] = run_ranks(_fit, 2, small_recipe(corpus, tmp_path_factory.mktemp("whole") / "run"))[0]
    return whole


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "harm"),
    [
        ("queue-00000.*", _flip),
        ("state-00001-00.safetensors", _truncate),
        ("state-00000-00.safetensors", Path.unlink),
        ("index.json", _flip),
        ("state.json", _flip),
        ("manifest.json", _truncate),
        ("", shutil.rmtree),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_damage_is_named_by_all_ranks_and_the_checkpoint_before_is_used_where_the_user_agrees(
    corpus: Path, half_way: Path, undisturbed: dict[str, Tensor], pattern: str, harm: object
) -> None:
    newest = half_way / "checkpoints" / "step-00000002"
    (damaged,) = newest.glob(pattern) if pattern else [newest]
    assert callable(harm)
    harm(damaged)
    for message in run_ranks(_refused, 2, small_recipe(corpus, half_way)):
        assert (damaged.name in message and "step-00000001" in message) and "resume.fallback=true" in message
    assert Store(half_way).latest() == newest

    state = run_ranks(_fit, 2, small_recipe(corpus, half_way, "resume.fallback=true"))[0]
    assert newest.with_name(newest.name + ".damaged").is_dir() == bool(pattern)  # what is gone cannot be set aside
    assert all(torch.equal(value, undisturbed[name]) for name, value in state.items())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["optimizer.learning_rate=0.5"],
            ["optimizer.learning_rate 0.01 -> 0.5", "'resume.allow_change=[optimizer.learning_rate]'"],
        ),
        (["seed=9", "resume.allow_change=[optimizer]"], ["seed 1 -> 9", "[optimizer, seed]"]),
        (["sampling.stages=[{from_step: 2, alpha: 0.1}]"], ["sampling.stages", "[sampling.stages]"]),
        (["sampling.weights={'*': 1}", "resume.allow_change=[seed]"], ["sampling.weights.* None -> 1.0"]),
        (["model.layers=3", "resume.allow_change=[model]"], ["model.layers 2 -> 3", "infoxlm export"]),
        (["batch.lanes=8", "resume.allow_change=[batch]"], ["batch.lanes 4 -> 8", "infoxlm export"]),
        (["contrast.mixup=paper", "resume.allow_change=[contrast]"], ["texts of a key 3 -> 6", "infoxlm export"]),
        (["weights.xlco=0", "resume.allow_change=[weights]"], ["tasks.xlco True -> False", "infoxlm export"]),
        (["resume.mode=never"], ["step-00000002", "resume.mode is never"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and "=" in value[0] else "",
)
def test_a_run_folder_belongs_to_one_recipe(
    corpus: Path, half_way: Path, overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        check_inputs(small_recipe(corpus, half_way, *overrides), 0, 2)
    assert all(word in str(caught.value) for word in words), caught.value


def _unpickled(rank: int, world: int, recipe: Recipe) -> list[str]:
    """What was unpickled while a run's checkpoint was loaded, exported and consolidated."""
    start_ranks()
    found: list[str] = []
    sys.addaudithook(lambda event, values: found.append(str(values)) if event.startswith("pickle.") else None)
    with pytest.raises(AttributeError):  # the hook sees what it should
        pickle.loads(b"cos\nnothing\n.")
    assert found.pop().endswith("'os', 'nothing')")
    build(agreed_inputs(recipe)).loader.close()
    export(recipe.run, recipe.run / "exported")
    consolidate(recipe.run, recipe.run / "consolidated")
    return found


def test_nothing_is_unpickled(corpus: Path, half_way: Path) -> None:
    assert run_ranks(_unpickled, 1, small_recipe(corpus, half_way)) == [[]]
    assert not list((half_way / "checkpoints").rglob("*.pt"))


def test_a_checkpoint_of_an_older_format_is_refused_with_the_way_over(corpus: Path, half_way: Path) -> None:
    newest = Store(half_way).at()
    state = newest / "state.json"
    state.write_text(state.read_text().replace('"format": 3', '"format": 2'))
    receipts = {"state.json": {"bytes": state.stat().st_size, "sha256": sha256_of(state)}}
    (newest / "manifest.json").write_text(json.dumps(receipts))
    for run in (
        lambda: check_inputs(small_recipe(corpus, half_way), 0, 2),
        lambda: export(half_way, half_way / "out"),
        lambda: consolidate(half_way, half_way / "out"),
    ):
        with pytest.raises(UserError, match=r"format 1 or 2, .* format 3: .* revision 570d66d .* model\.init$"):
            run()
    for message in run_ranks(_refused, 2, small_recipe(corpus, half_way, "resume.fallback=true")):
        assert message.endswith("model.init")
    assert newest.is_dir() and not (half_way / "out").exists()


def _refused_with_another_init(rank: int, world: int, recipe: Recipe, other: Recipe) -> str:
    start_ranks()
    state = build(agreed_inputs(recipe))
    train_step(state)
    save(state, None)
    state.loader.close()
    assert recipe.model.init is not None
    if rank == 0:
        shutil.rmtree(recipe.model.init)
        shutil.copytree(str(other.model.init), recipe.model.init)
    dist.barrier()
    with pytest.raises(UserError) as caught:
        build(agreed_inputs(recipe))
    return str(caught.value)


def test_a_model_whose_shape_changed_behind_its_name_is_refused(corpus: Path, tmp_path: Path) -> None:
    recipes = []
    for name, width in (("one", 32), ("other", 64)):
        recipe = small_recipe(corpus, tmp_path / name, "weights.xlco=0", f"model.width={width}")
        run_ranks(stop_after_two, 1, recipe)
        export(tmp_path / name, tmp_path / f"{name}-model")
        init = f"model.init={tmp_path}/{name}-model"
        recipes.append(small_recipe(corpus, tmp_path / "run", "weights.xlco=0", init))
    for message in run_ranks(_refused_with_another_init, 2, *recipes):
        assert "another model" in message and ", 64] with" in message and ", 32] with" in message


def test_every_bit_of_a_manifest_counts(half_way: Path) -> None:
    manifest = Store(half_way).at() / "manifest.json"
    whole = manifest.read_bytes()
    for at in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        manifest.write_bytes(flipped)
        if not _same_json(bytes(flipped), whole):
            assert damage_of(manifest.parent) == "manifest.json differs from what was written"


def _same_json(one: bytes, other: bytes) -> bool:
    """Whether only spaces differ."""
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("kept")


@pytest.mark.parametrize(
    ("instead", "step"),
    [
        (lambda path: None, 2),
        (lambda path: path.symlink_to("gone"), 2),
        (lambda path: path.symlink_to(path.name), 2),
        (_folder, 2),
        (lambda path: path.symlink_to("step-00000001"), 1),
    ],
    ids=["nothing", "dangling", "loop", "folder", "link to a step"],
)
def test_a_lost_pointer_is_mended(
    corpus: Path, half_way: Path, instead: Callable[[Path], None], step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the newest checkpoint, or from the one that a link of the user names."""
    pointer = half_way / "checkpoints" / "latest"
    pointer.unlink()
    instead(pointer)
    recipe = small_recipe(corpus, half_way)
    assert not check_inputs(recipe, 0, 2).finished
    Checkpoints(recipe).lock()
    assert pointer.read_text() == f"step-{step:08d}" and not pointer.is_symlink()
    assert f"was no file: it now names step-{step:08d}" in capsys.readouterr().out
    kept = list(pointer.parent.glob("latest.damaged-*"))
    assert [(path / "file").read_text() for path in kept if path.is_dir() and not path.is_symlink()] == ["kept"] * (
        instead is _folder
    )
    assert run_ranks(_positions, 2, recipe)[0][0] == step + 1


def test_a_finished_run_is_finished_on_any_number_of_ranks(corpus: Path, tmp_path: Path) -> None:
    recipe = small_recipe(corpus, tmp_path / "run", "optimizer.steps=2")
    run_ranks(_fit, 2, recipe)
    assert check_inputs(recipe, 0, 1).finished and check_inputs(recipe, 0, 4).finished


def test_a_run_that_must_go_on_does_not_start(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no checkpoint and resume\.mode is required"):
        check_inputs(small_recipe(corpus, tmp_path / "run", "resume.mode=required"), 0, 1)


@pytest.mark.parametrize("name", ["", "step-1", "../../etc"])
def test_a_pointer_to_nothing_is_a_mistake(corpus: Path, tmp_path: Path, name: str) -> None:
    recipe = small_recipe(corpus, tmp_path / "run")
    (recipe.run / "checkpoints").mkdir(parents=True)
    (recipe.run / "checkpoints" / "latest").write_text(name)
    with pytest.raises(UserError, match="write the name of a checkpoint"):
        check_inputs(recipe, 0, 1)


def test_a_run_folder_that_cannot_be_made_is_a_mistake(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        Checkpoints(small_recipe(corpus, tmp_path / "x", f"run={tmp_path}/file/run")).lock()


def _positions(rank: int, world: int, recipe: Recipe) -> tuple[int, dict[str, dict[int, tuple[int, int]]]]:
    start_ranks()
    state = build(agreed_inputs(recipe))
    train_step(state)
    state.loader.close()
    return state.step, state.loader.cursors


def test_what_the_user_names_may_change(corpus: Path, half_way: Path) -> None:
    """A new order leaves what was left of each window; a loss that was off starts its stream."""
    before = read_state(Store(half_way).at())["cursors"]
    changes = ("seed=9", "optimizer.learning_rate=0.5", "resume.allow_change=[seed, optimizer.learning_rate]")
    for step, cursors in run_ranks(_positions, 2, small_recipe(corpus, half_way, *changes)):
        assert step == 3
        for task, lanes in cursors.items():
            for lane, (window, _) in lanes.items():
                assert window > before[task][str(lane)][0]


def test_a_loss_that_was_off_starts_its_stream(corpus: Path, tmp_path: Path) -> None:
    run_ranks(stop_after_two, 2, small_recipe(corpus, tmp_path / "run", "weights.tlm=0"))
    recipe = small_recipe(corpus, tmp_path / "run", "resume.allow_change=[weights]")
    for step, cursors in run_ranks(_positions, 2, recipe):
        assert step == 3 and set(cursors) == {"mmlm", "tlm", "xlco"}


def _resized(rank: int, world: int, recipe: Recipe) -> tuple[list[float], list[int]]:
    start_ranks()
    state = build(agreed_inputs(recipe))
    assert state.queue is not None
    filled = [state.queue.filled]
    while state.step < 5:
        assert train_step(state)
        filled.append(state.queue.filled)
    return filled, sorted(state.queue.steps.tolist())


@pytest.mark.slow
@pytest.mark.parametrize(("size", "sharded"), [(70, False), (70, True), (30, False), (40, True)])
def test_a_queue_of_another_size_goes_on_with_the_newest_keys(
    corpus: Path, half_way: Path, size: int, sharded: bool
) -> None:
    """24 keys a step: after two steps the queue of 40 is full."""
    recipe = small_recipe(
        corpus, half_way, f"contrast.queue.size={size}", f"contrast.queue.sharded={str(sharded).lower()}"
    )
    results = run_ranks(_resized, 2, recipe)
    expected = [min(1.0, (40 + 24 * step) / size) for step in range(4)]
    assert [filled for filled, _ in results] == [expected, expected]
    steps = sorted(step for _, held in (results if sharded else results[:1]) for step in held)
    assert steps == sorted([5] * 24 + [4] * 24 + [3] * 24)[-size:]


def test_a_larger_queue_that_could_not_fill_is_refused(corpus: Path, half_way: Path) -> None:
    for message in run_ranks(_refused, 2, small_recipe(corpus, half_way, "contrast.queue.size=143")):
        assert "contrast.queue.size 143" in message and "4 steps" in message


def test_a_start_waits_for_a_process_that_is_about_to_end(corpus: Path, tmp_path: Path) -> None:
    recipe = small_recipe(corpus, tmp_path / "run")
    context = multiprocessing.get_context("fork")
    holding = context.Event()

    def first() -> None:
        Checkpoints(recipe).lock()
        holding.set()
        time.sleep(1)

    process = context.Process(target=first)
    process.start()
    assert holding.wait(30)
    Checkpoints(recipe).lock()
    process.join()


def test_a_second_process_in_a_run_folder_is_refused_and_told_of_the_first(corpus: Path, tmp_path: Path) -> None:
    recipe = small_recipe(corpus, tmp_path / "run")
    first = Checkpoints(recipe)
    first.lock()
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def second() -> None:
        try:
            Checkpoints(recipe).lock()
        except UserError as error:
            answers.put(str(error))

    process = context.Process(target=second)
    process.start()
    message = answers.get(timeout=30)
    assert f"process {multiprocessing.current_process().pid} on " in message and "trains in" in message
    process.join()


@pytest.mark.slow
def test_what_was_never_committed_is_removed_at_the_next_start(
    corpus: Path, half_way: Path, undisturbed: dict[str, Tensor]
) -> None:
    folder = half_way / "checkpoints"
    for suffix in (".partial", ".removed"):
        shutil.copytree(folder / "step-00000002", folder / f"step-00000004{suffix}")
    newer = folder / "step-00000003"
    shutil.copytree(folder / "step-00000002", newer)  # killed between its name and `latest`
    Checkpoints(small_recipe(corpus, half_way)).lock()
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"step-00000001", "step-00000002", newer.name}
    assert Store(half_way).steps() == [folder / "step-00000001", folder / "step-00000002"]
    state = run_ranks(_fit, 2, small_recipe(corpus, half_way, "checkpoint.every=1", "checkpoint.keep=5"))[0]
    assert damage_of(newer) == "" and read_state(newer)["step"] == 3
    assert all(torch.equal(value, undisturbed[name]) for name, value in state.items())


def test_the_newest_and_every_kth_are_kept(corpus: Path, tmp_path: Path) -> None:
    keep = ("checkpoint.every=1", "checkpoint.keep=2", "checkpoint.keep_every=3", "optimizer.steps=8")
    run_ranks(_fit, 2, small_recipe(corpus, tmp_path / "run", *keep))
    assert [p.name[-1] for p in Store(tmp_path / "run").steps()] == ["3", "6", "7", "8"]


def _unsaved(rank: int, world: int, recipe: Recipe) -> str:
    start_ranks()
    state = build(agreed_inputs(recipe))
    with pytest.raises(SaveFailed) as caught:
        fit(state, None)
    state.loader.close()
    return str(caught.value)


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_ranks_agree_that_a_disk_is_full(corpus: Path, small_disk: Path, asynchronous: str) -> None:
    """The disk has room for one checkpoint and a half."""
    recipe = small_recipe(corpus, small_disk, f"checkpoint.asynchronous={asynchronous}")
    for message in run_ranks(_unsaved, 2, recipe):
        assert "No space left on device" in message
    newest = Store(small_disk).at()
    assert newest.name == "step-00000002" and damage_of(newest) == ""
    assert not list(newest.parent.glob("*.partial"))
