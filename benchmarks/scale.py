"""Shows what grows with the number of ranks, by simulation, by measurement and by the plan's arithmetic. Prints the
tables of docs/scale.md.

Order of data: the readers of all ranks read 100 steps, one lane (micro-batch) for each rank, a quarter of base.yaml's.
The corpus has a thousand million rows, of which only the lengths exist. Start: CPU seconds that each rank needs before
it meets the others. Cost: bytes sent, gathers, queue and checkpoints of the shipped recipes, with one lane for each
rank from 64 ranks on. Seconds are computed from the bandwidths in the options, which are assumptions.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infoxlm_ds.data.files import File
from infoxlm_ds.data.manifest import NAME, Manifest, Shard, Source, Tokenizer, load_manifest
from infoxlm_ds.data.mixture import KINDS, Mixture
from infoxlm_ds.data.order import Plan, SourceSize, Stage, keyed_generator
from infoxlm_ds.data.packs import ROWS, Pack
from infoxlm_ds.data.stream import StreamReader
from infoxlm_ds.planner.cost import wire
from infoxlm_ds.planner.memory import checkpoint_bytes, memory, queue_bytes
from infoxlm_ds.planner.report import GIB, Wishes, read_setting
from infoxlm_ds.planner.workload import Setting

ROOT = Path(__file__).parent.parent
WORLDS = (8, 64, 1024)
SEED, ALPHA = 1, 0.7
BASE = {"mmlm": {"tokens": 16384, "overhead": 2}, "tlm": {"tokens": 4096, "overhead": 4}, "xlco": {"items": 32}}
FRACTIONS = {"mono.en": 0.5, "mono.sw": 0.1, "para.en-sw": 0.1, "nway.ted": 0.3}
SIDES = {"mono.en": ("en",), "mono.sw": ("sw",), "para.en-sw": ("en", "sw"), "nway.ted": ("de", "en", "sw")}


class PaperCorpus:
    """A corpus of any number of rows in four sources. The lengths of a pack are drawn when it is read."""

    def __init__(self, rows: int) -> None:
        self.path, self.languages = Path("paper"), ["de", "en", "sw"]
        self.sources = [_source(name, int(fraction * rows)) for name, fraction in FRACTIONS.items()]

    def ahead(self, packs: Iterable[tuple[int, int]]) -> None:
        """Nothing is read."""

    def pack(self, source: int, number: int) -> Pack:
        of_source = self.sources[source]
        generator = keyed_generator("lengths", source, number)
        rows = min(ROWS, of_source.items - number * ROWS)
        lengths = generator.integers(5, 60, (len(of_source.languages), rows)).astype(np.uint16)
        return Pack(np.zeros(int(lengths.sum()), np.uint32), lengths, lengths.astype(np.uint64))

    def first_row(self, source: int, number: int) -> int:
        return number * ROWS


def _source(name: str, rows: int, shards: tuple[Shard, ...] = ()) -> Source:
    kind: Any = name.split(".")[0]
    index = File(name=f"{name}/index.npy", bytes=0, sha256="")
    packs = -(-rows // ROWS)
    return Source(
        name=name,
        kind=kind,
        languages=SIDES[name],
        items=rows,
        tokens=30 * rows,
        packs=packs,
        index=index,
        shards=shards,
    )


@dataclass(frozen=True)
class Course:
    """What all ranks read together. `twice`: items that were read more than once; `astray`: items that are in no window
    of the lane that read them; `missing`: items of these windows, before the lane's position, that nobody read;
    `seconds`: of CPU; `held`: bytes of the last rank's readers, after a tenth of the steps and at the end."""

    items: int
    twice: int
    astray: int
    missing: int
    seconds: float
    held: tuple[int, int]


def simulate(
    ranks: range,
    world: int,
    steps: int,
    rows: int,
    sizes: dict[str, dict[str, int]],
    window_packs: int = 4,
    trace: bool = False,
) -> Course:
    """Read every item of these ranks of a world in so many steps, one lane for each rank. `trace`: measure memory too,
    which is slow."""
    corpus: Any = PaperCorpus(rows)
    taken: dict[str, list[np.ndarray]] = {stream: [] for stream in sizes}
    lanes = {stream: Lanes(corpus, stream, world, window_packs) for stream in sizes}
    options: dict[str, Any] = {"seed": SEED, "lanes": world, "window_packs": window_packs}
    astray = missing = 0
    seconds, early, late = 0.0, 0, 0
    for rank in ranks:
        if trace:
            tracemalloc.start()
        started = time.process_time()
        readers = {
            stream: StreamReader(corpus, stream, mixture=lanes[stream].mixture, own_lanes=[rank], **options)
            for stream in sizes
        }
        of_rank: dict[str, list[np.ndarray]] = {stream: [] for stream in sizes}
        for step in range(steps):
            for stream, size in sizes.items():
                of_rank[stream].append(readers[stream].take(rank, **size).where)
            if trace and step + 1 == max(1, steps // 10):
                early = tracemalloc.get_traced_memory()[0] - _bytes(of_rank)
        seconds += time.process_time() - started
        if trace:
            late = tracemalloc.get_traced_memory()[0] - _bytes(of_rank)
            tracemalloc.stop()
        for stream, reader in readers.items():
            source, epoch, row = np.concatenate(of_rank[stream], axis=1)
            codes = (source * 2**12 + epoch) * 2**44 + row  # one number an item
            wrong, left = lanes[stream].compare(codes, rank, *reader.state()[rank])
            astray, missing = astray + wrong, missing + left
            taken[stream].append(codes)
    everything = {stream: np.concatenate(codes) for stream, codes in taken.items()}
    twice = sum(len(codes) - len(np.unique(codes)) for codes in everything.values())
    return Course(sum(map(len, everything.values())), twice, astray, missing, seconds, (early, late))


def _bytes(taken: dict[str, list[np.ndarray]]) -> int:
    return sum(part.nbytes for parts in taken.values() for part in parts)


class Lanes:
    """The items that the plan gives to each lane of a stream."""

    def __init__(self, corpus: PaperCorpus, stream: str, lanes: int, window_packs: int) -> None:
        self._numbers = [i for i, source in enumerate(corpus.sources) if source.kind in KINDS[stream]]
        self._sizes = [SourceSize(s.name, s.items, s.packs) for s in (corpus.sources[i] for i in self._numbers)]
        stages = (Stage(0, np.array([float(size.items) for size in self._sizes]) ** ALPHA),)
        self.mixture = Mixture(tuple(self._numbers), stages)
        self._plan, self._lanes, self._packs = Plan(self._sizes, stages, SEED, stream), lanes, window_packs

    def compare(self, codes: np.ndarray, lane: int, window: int, offset: int) -> tuple[int, int]:
        """Compare a lane's items with its windows before `window` and the first `offset` items of that. Returns how
        many items are in none of them, and how many of theirs are missing."""
        draws = [draw for k in range(window + 1) for draw in self._plan.window(lane, k, self._lanes, self._packs)]
        begin = [(self._numbers[d.source] * 2**12 + d.epoch) * 2**44 // ROWS + d.pack for d in draws]
        rows = [min(ROWS, self._sizes[d.source].items - d.pack * ROWS) for d in draws]
        due = sum(rows[: window * self._packs]) + offset
        return int((~np.isin(codes // ROWS, begin)).sum()), due - len(codes)


def cpu_seconds(code: str) -> float:
    """CPU seconds of a Python process that runs this code: the median of three."""
    measure = "import resource; u = resource.getrusage(resource.RUSAGE_SELF); print('\\n', u.ru_utime + u.ru_stime)"
    command = [sys.executable, "-c", f"{code}\n{measure}"]
    runs = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True) for _ in range(3)]
    return statistics.median(float(done.stdout.split()[-1]) for done in runs)


def write_large_manifest(folder: Path, shards: int) -> None:
    """Write the manifest of a corpus with so many shards of 256 MB."""
    names = list(FRACTIONS)
    files: dict[str, list[Shard]] = {name: [] for name in names}
    for i in range(shards):
        name = names[i % len(names)]
        files[name].append(Shard(name=f"{name}/{name}-{i:05d}.tar", bytes=2**28, sha256=f"{i:064x}", packs=4000))
    sources = tuple(_source(name, 4000 * ROWS * len(of_name), tuple(of_name)) for name, of_name in files.items())
    tokenizer = Tokenizer(name="XLM-R", vocab_size=250_002, special_ids={}, files=())
    manifest = Manifest(name="large", max_tokens=510, tokenizer=tokenizer, sources=sources, counts={}, prep={})
    (folder / NAME).write_text(manifest.render(), encoding="utf-8")


def setting_of(recipe: str, world: int) -> Setting:
    """The recipe with 64 lanes, or one for each rank if there are more. Those of base and large have BASE's size: their
    own, larger lanes are too few for so many ranks."""
    small = [f"batch.mmlm_tokens={BASE['mmlm']['tokens']}", f"batch.tlm_tokens={BASE['tlm']['tokens']}"]
    small.append(f"batch.xlco_pairs={BASE['xlco']['items']}")
    overrides = ["model.init=null", f"batch.lanes={max(64, world)}", *(small if recipe != "xl" else [])]
    return read_setting(ROOT / "recipes" / f"{recipe}.yaml", overrides, Wishes(world))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wire", type=float, default=25, help="GB/s that one rank can send")
    parser.add_argument("--disk", type=float, default=10, help="GB/s of the shared file system, all ranks together")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    _order(options.steps)
    _start()
    _cost(options.wire * 1e9, options.disk * 1e9)


def _order(steps: int) -> None:
    _row("ranks", "items", "twice", "astray", "missing", "CPU s a rank and step", "MB held early", "at the end")
    for world in WORLDS:
        course = simulate(range(world), world, steps, 10**9, BASE)
        held = simulate(range(1), world, steps, 10**9, BASE, trace=True).held
        each = course.seconds / world / steps
        counts = (course.items, course.twice, course.astray, course.missing)
        _row(world, *(f"{n:,}" for n in counts), f"{each:.4f}", *(f"{n / 1e6:.1f}" for n in held))


def _start() -> None:
    print()
    _row("before ranks meet", "CPU s")
    _row("imports", f"{cpu_seconds('import infoxlm_ds.train'):.1f}")
    with tempfile.TemporaryDirectory() as folder:
        for shards in (40, 40_000):
            write_large_manifest(Path(folder), shards)
            started = time.process_time()
            load_manifest(Path(folder))
            size = (Path(folder) / NAME).stat().st_size / 1e6
            _row(f"manifest of {shards:,} shards ({size:.2f} MB)", f"{time.process_time() - started:.2f}")


def _cost(wire_speed: float, disk_speed: float) -> None:
    print()
    heads = ["ZeRO", "pairs a step", "MB sent a rank", "of it keys", "s", "queue MB a rank", "sharded"]
    _row("recipe, ranks", *heads, "peak GiB", "checkpoint GB", "s")
    for recipe in ("base", "large", "xl"):
        for world in WORLDS:
            s = setting_of(recipe, world)
            sent, whole = wire(s), sum(wire(s).values())
            pairs = s.recipe.batch.lanes * s.recipe.batch.xlco_pairs
            queue = queue_bytes(s)
            saved = checkpoint_bytes(s)
            numbers = (f"{whole / 1e6:,.0f}", f"{sent['keys'] / 1e6:,.1f}", f"{whole / wire_speed:.2f}")
            stored = (f"{queue / 1e6:,.0f}", f"{queue / world / 1e6:,.1f}")
            kept = (f"{memory(s).peak / GIB:.1f}", f"{saved / 1e9:.1f}", f"{saved / disk_speed:.1f}")
            _row(f"{recipe}, {world}", s.stage, f"{pairs:,}", *numbers, *stored, *kept)


def _row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
