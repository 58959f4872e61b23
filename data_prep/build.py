"""Turns raw text into a corpus folder: reads, cleans, filters and tokenises block by block (map), then drops
duplicates, shuffles and writes packs range by range (reduce).

The same description and inputs always give the same bytes, whatever runs the tasks. Tasks write to `OUT.work`, which is
removed at the end: a build that ended early goes on from there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from data_prep.corpus_folder import file_of, write_index, write_manifest, write_samples
from data_prep.description import CorpusDescription, load_description
from data_prep.encode import Encoder
from data_prep.filters.report import QUOTED, Report, Sample
from data_prep.inputs import Input, also_read, expansion, hashes_of, read_inputs, stated
from data_prep.map import MapTask, Setting, map_block
from data_prep.near_duplicates import ChooseTask, LinkTask, SignTask, choose, link, sign
from data_prep.reduce import Reduced, ReduceTask, Target, read_reduced, reduce_shard, shards_of, targets_of
from data_prep.run import ONE, How, Stage, Task, run
from data_prep.sample import LEAST, SampleTask, sample_block
from data_prep.sources.files import size_of
from data_prep.table import Footer, read_footer
from data_prep.texts import Texts, texts_of
from data_prep.tokenizer import TokenizerTask, describe_tokenizer, load_fast, make_tokenizer
from infoxlm_ds.config import UserError
from infoxlm_ds.data import manifest as manifests
from infoxlm_ds.data.manifest import Manifest, Shard, Source, load_manifest

BUCKET = 32 * 2**20  # bytes of text
TRIED = 2000  # texts of each source on which SentencePiece must agree with the tokenizer
MOST_FAULTS = 0.01  # of rows and sentences


def build(description_path: Path, out: Path, how: How = ONE) -> None:
    """Prepare the corpus of a description in the new folder `out`. If it exists already, do nothing.

    The folder gets its name after all files are written. UserError if the description is wrong, an input cannot be
    read, or `out` holds something else.
    """
    description = load_description(description_path)
    base, console = description_path.parent.absolute(), Console(stderr=True, soft_wrap=True)
    say = partial(console.print, highlight=False, markup=False)
    inputs = read_inputs(description, base)
    hashes = hashes_of(description, base, inputs)
    prep = {"description": description.model_dump(mode="json"), "inputs": hashes}
    work = out.with_name(f"{out.name}.work")
    stages = _Build(description, base, inputs, hashes, work, how, console)
    if out.exists():
        if not (out / manifests.NAME).is_file():
            raise UserError(f"{out} exists and holds no corpus: remove it or choose another folder")
        if load_manifest(out).prep != prep:
            raise UserError(
                f"{out} holds the corpus of another description or other inputs: remove it or choose another folder"
            )
        say(f"{out}: prepared already")
        if how.part[1] == 1:
            stages.remove()
        return
    try:
        stages.write(out, prep)
    except BaseException:
        if stages.has_done():
            say(f"{work} keeps what is done: run the same command again to go on, or remove it")
        elif how.part[1] == 1:
            stages.remove()
        raise
    if how.part[1] == 1:
        stages.remove()
        say(f"{out}: done")
    else:
        say(f"part {how.part[0]} of {how.part[1]}: done; when all parts have ended, {work} can be removed")


class _Build:
    """The stages of a build."""

    def __init__(
        self,
        description: CorpusDescription,
        base: Path,
        inputs: list[Input],
        hashes: dict[str, str],
        work: Path,
        how: How,
        console: Console,
    ) -> None:
        self._description, self._base, self._inputs, self._how, self._console = description, base, inputs, how, console
        self._names = [self._name(number, one, hashes) for number, one in enumerate(inputs)]
        settings = description.model_dump(mode="json", exclude={"sources"})
        read = [hashes[stated(path, base)] for path in also_read(description, base)]
        self._work = work / _short_hash([manifests.FORMAT, version("infoxlm-ds"), settings, read])
        files = {part.file for one in inputs for part in one.block.parts}
        text = sum(size_of(file) * expansion(file) for file in files)
        self._buckets = 1 << (max(1, -(-text // BUCKET)) - 1).bit_length()

    def _name(self, number: int, one: Input, hashes: dict[str, str]) -> str:
        """The name of a block's tasks. It holds a hash of all that the block's text depends on."""
        source = self._description.sources[one.source]
        read = [(*part[1:], hashes[stated(part.file, self._base)]) for part in one.block.parts]
        settings = source.model_dump(mode="json", exclude={"license", "homepage"})
        return f"{source.name}-{number:06d}-{_short_hash([settings, read])}"

    def _hash_of(self, paths: Sequence[Path]) -> str:
        """A hash of the names of tasks' outputs, for the name of what is made of them."""
        return _short_hash([str(path.relative_to(self._work)) for path in paths])

    def has_done(self) -> bool:
        """Whether a task has left anything."""
        return any(path.is_file() for path in self._work.rglob("*"))

    def remove(self) -> None:
        """Remove what tasks have left, and the folder around it if nothing else is there."""
        shutil.rmtree(self._work, ignore_errors=True)
        with suppress(OSError):
            self._work.parent.rmdir()

    def write(self, out: Path, prep: dict[str, Any]) -> None:
        """Run all stages, then give the corpus folder its name."""
        tried = self._first_texts()  # before any work: what is wrong with the files often shows in their first lines
        tokenizer = self._tokenizer()
        described = describe_tokenizer(tokenizer, ())
        unknown = described.special_ids["unk"]
        setting = Setting(self._description, self._base, tokenizer, unknown, buckets=self._buckets)
        setting = setting._replace(pieces=Encoder(tokenizer, unknown, pieces=True).agrees(tried))
        mapped = self._map(setting)
        folder = self._work / f"corpus-{self._hash_of(mapped.spills)}"
        reduced = self._reduce(mapped, folder, self._near_duplicates(mapped))
        if self._how.part[0] == 0:
            shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
            self._finish(folder, described, mapped, reduced, prep)
            folder.replace(out)

    def _run(self, stage: Stage) -> None:
        run(stage, self._how, self._console)

    def _tokenizer(self) -> Path:
        """The tokenizer's folder, made if need be. Its name holds the texts that it is trained on."""
        description, samples = self._description.tokenizer, list[Path]()
        if description.path is None:
            most = max(LEAST, 4 * description.sentences // len(self._inputs))
            tasks = [
                Task(
                    sample_block,
                    SampleTask(self._description, self._base, one.source, one.block, most),
                    self._work / f"sample-{most}" / name,
                    one.bytes,
                )
                for name, one in zip(self._names, self._inputs, strict=True)
            ]
            samples = [task.out for task in tasks]
        folder = self._work / f"tokenizer-{self._hash_of(samples)}"
        if folder.is_dir():
            return folder
        if samples:
            self._run(Stage("choosing text for the tokenizer", tasks))
        argument = TokenizerTask(description, self._base, tuple(samples))
        self._run(Stage("making the tokenizer", [Task(make_tokenizer, argument, folder, 0)]))
        return folder

    def _first_texts(self) -> list[str]:
        """Some texts of each source."""
        tried: list[str] = []
        for number, of_source in itertools.groupby(self._inputs, key=lambda one: one.source):
            source = self._description.sources[number]
            items = Texts(self._description, self._base, source, next(of_source).block)
            tried += itertools.islice((text for item in items for text in texts_of(item)), TRIED)
        return tried

    def _map(self, setting: Setting) -> Mapped:
        spills_of = self._work / f"map-{_short_hash([setting.tokenizer.name, setting.pieces, setting.buckets])}"
        tasks = [
            Task(map_block, MapTask(setting, one.source, one.block), spills_of / name, one.bytes)
            for name, one in zip(self._names, self._inputs, strict=True)
        ]
        self._run(Stage("reading and encoding", tasks, _counted))
        spills = tuple(task.out for task in tasks)
        footers = [read_footer(spill) for spill in spills]
        report = Report(self._description.seed)
        for footer in footers:
            report.merge(Report.of_tree(self._description.seed, footer.notes))
        for notice in dict.fromkeys(notice for footer in footers for notice in footer.notes["notices"]):
            self._console.print(notice, highlight=False, markup=False)
        faults, read = report.counts["faults"], report.counts["rows"] + report.counts["sentences"]
        if faults > MOST_FAULTS * (read + faults):
            first = report.samples["faults"][0]
            raise UserError(
                f"{faults:,} of {read + faults:,} rows or sentences cannot be used, more than {MOST_FAULTS:.0%}; one "
                f"of them: {first.place}: {first.texts['']}: correct the files"
            )
        targets = targets_of(footers, self._buckets)
        if not targets:
            raise UserError(
                "no row is left after cleaning: check the sources, languages and filters of the description"
            )
        self._check(targets, footers)
        return Mapped(spills, [set(footer.frames) for footer in footers], report, targets)

    def _check(self, targets: dict[str, Target], footers: Sequence[Footer]) -> None:
        """UserError if pairs have more than two languages. Says which sources gave nothing."""
        for number, source in enumerate(self._description.sources):
            if source.kind == "para" and source.name in targets and len(targets[source.name].languages) > 2:
                raise UserError(
                    f"source {source.name}: kind para has two languages, but the data has "
                    f"{' '.join(targets[source.name].languages)}: use kind nway, or one source for each pair"
                )
            of_source = (f for one, f in zip(self._inputs, footers, strict=True) if one.source == number)
            if not any(footer.frames for footer in of_source):
                self._console.print(f"source {source.name}: nothing is left of it", highlight=False, markup=False)

    def _near_duplicates(self, mapped: Mapped) -> dict[str, Path]:
        """By source, the file with the hashes of the rows that go, if they are to be looked for."""
        settings, reference = self._description.filters.near_duplicates, self._description.filters.reference
        if settings is None:
            return {}
        work = self._work / f"near-{self._hash_of(mapped.spills)}"
        signing = [
            Task(
                sign,
                SignTask(spill, settings, reference, self._buckets),
                work / spill.name,
                spill.stat().st_size,
            )
            for spill in mapped.spills
        ]
        self._run(Stage("near-duplicates, signing", signing))
        signed = [task.out for task in signing]
        linking = {
            name: [
                Task(
                    link,
                    LinkTask(name, part, mapped.holding(name, signed)),
                    work / f"{name}-{part}.npy",
                    1,
                )
                for part in range(self._buckets)
            ]
            for name in mapped.targets
        }
        self._run(Stage("near-duplicates, linking", list(itertools.chain.from_iterable(linking.values()))))
        choosing = {
            name: Task(choose, ChooseTask(tuple(task.out for task in tasks)), work / f"{name}.npy", 1)
            for name, tasks in linking.items()
        }
        self._run(Stage("near-duplicates, choosing", list(choosing.values())))
        return {name: task.out for name, task in choosing.items()}

    def _reduce(self, mapped: Mapped, folder: Path, left_out: dict[str, Path]) -> dict[str, list[Task]]:
        tasks: dict[str, list[Task]] = {}
        for name, target in mapped.targets.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            tasks[name] = []
            spills = mapped.holding(name, mapped.spills)
            for number, buckets in enumerate(shards_of(target.sizes)):
                shard = folder / name / f"{name}-{number:05d}.tar"
                argument = ReduceTask(shard, name, target.languages, spills, buckets, left_out.get(name))
                size = int(target.sizes[slice(*buckets)].sum())
                out = self._work / "reduce" / folder.name / f"{shard.stem}.json"
                if not shard.exists():  # it went into a corpus before
                    out.unlink(missing_ok=True)
                tasks[name].append(Task(reduce_shard, argument, out, size))
        everything = [task for of_target in tasks.values() for task in of_target]
        self._run(Stage("shuffling and writing", everything, _dropped))
        return tasks

    def _finish(
        self,
        folder: Path,
        described: manifests.Tokenizer,
        mapped: Mapped,
        reduced: dict[str, list[Task]],
        prep: dict[str, Any],
    ) -> None:
        """Write indices, samples and manifest."""
        files = tuple(file_of(folder, path) for path in sorted((folder / "tokenizer").iterdir()))
        counts, tokenizer = Counter(mapped.report.counts), load_fast(folder / "tokenizer")
        sources = []
        for name, tasks in reduced.items():
            source, written = _source(folder, name, mapped.targets[name].languages, tasks)
            sources.append(source)
            counts[f"duplicate_{'blocks' if source.kind == 'mono' else 'rows'}"] += sum(r.duplicates for r in written)
            if self._description.filters.near_duplicates is not None:
                counts["near_duplicates"] += sum(reduced.near_duplicates for reduced in written)
                mapped.report.merge(self._samples(name, written, tokenizer))
        order = [source.name for source in self._description.sources]
        sources.sort(key=lambda source: (order.index(source.name) if source.name in order else len(order), source.name))
        samples = mapped.report.tree()["samples"]
        for sample in itertools.chain.from_iterable(samples.values()):  # the same wherever the files lie
            sample["place"] = sample["place"].removeprefix(f"{self._base}{os.sep}")
        manifest = Manifest(
            name=self._description.name,
            max_tokens=self._description.max_tokens,
            tokenizer=described.model_copy(update={"files": files}),
            sources=tuple(sources),
            samples=write_samples(folder, samples),
            counts=dict(sorted(counts.items())),
            prep=prep,
        )
        write_manifest(folder, manifest)

    def _samples(self, source: str, written: list[Reduced], tokenizer: Any) -> Report:
        """Texts of near-duplicates that went, for the report."""
        report = Report(self._description.seed)
        report.samples["near_duplicates"] = [
            Sample(key, f"source {source}", {language: tokenizer.decode(ids)[:QUOTED]})
            for reduced in written
            for key, language, ids in reduced.samples
        ]
        return report


class Mapped(NamedTuple):
    """What the map stage wrote and found. `held`: the sources of the corpus that each spill holds."""

    spills: tuple[Path, ...]
    held: list[set[str]]
    report: Report
    targets: dict[str, Target]

    def holding(self, source: str, outputs: Sequence[Path]) -> tuple[Path, ...]:
        """Of one output for each spill, those of the spills that hold a source."""
        return tuple(out for out, held in zip(outputs, self.held, strict=True) if source in held)


def _counted(out: Path) -> Counter[str]:
    return Counter(read_footer(out).notes["counts"])


def _dropped(out: Path) -> Counter[str]:
    reduced = read_reduced(out)
    return Counter(duplicates=reduced.duplicates, near_duplicates=reduced.near_duplicates)


def _source(folder: Path, name: str, languages: tuple[str, ...], tasks: list[Task]) -> tuple[Source, list[Reduced]]:
    """The manifest's entry of a source, after its index is written, and what was written."""
    shards, indices, written = [], [], [read_reduced(task.out) for task in tasks]
    for number, (task, reduced) in enumerate(zip(tasks, written, strict=True)):
        of_shard = np.array(reduced.packs, np.int64).reshape(-1, 5)
        indices.append(np.insert(of_shard, 0, number, axis=1))
        name_of_shard = str(task.argument.shard.relative_to(folder))
        shards.append(Shard(name=name_of_shard, bytes=reduced.bytes, sha256=reduced.sha256, packs=len(of_shard)))
    index = np.concatenate(indices)
    source = Source(
        name=name,
        kind=name.partition(".")[0],  # type: ignore[arg-type]
        languages=languages,
        items=sum(reduced.items for reduced in written),
        tokens=int(index[:, 4].sum()),
        packs=len(index),
        index=write_index(folder, name, index),
        shards=tuple(shards),
    )
    return source, written


def _short_hash(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]
