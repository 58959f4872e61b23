"""`infoxlm prep build --dry-run`: what a build would read, and about how much disk and time it would take."""

from __future__ import annotations

import itertools
import shutil
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from data_prep.description import CorpusDescription, load_description
from data_prep.inputs import Input, expansion, is_dense, read_inputs
from data_prep.rows import Row
from data_prep.sources import READERS
from data_prep.texts import Texts, texts_of

SAMPLE = 2**18  # bytes of each source
PIECE = 3.7  # bytes of text of a piece: XLM-R's vocabulary, mean of many languages
SIDE = 10  # bytes in a pack beside its ids
STAGES = 2.5  # times the time of reading, cleaning and filtering, for a whole build


class Estimate(NamedTuple):
    """What a source takes: bytes on disk, bytes of packs, seconds of one core."""

    stored: int
    packs: float
    seconds: float


def print_estimate(description_path: Path, out: Path, workers: int, console: Console) -> None:
    """Read the beginning of each source and print what follows from it. UserError as for a build."""
    description, base = load_description(description_path), description_path.parent.absolute()
    table = Table("source", "format", title=f"{description_path}, estimated from the beginning of each source")
    for heading in ("files", "blocks", "MB", "MB of packs", "minutes"):
        table.add_column(heading, justify="right")
    estimates = []
    for number, of_source in itertools.groupby(read_inputs(description, base), key=lambda one: one.source):
        source, inputs = description.sources[number], list(of_source)
        estimate = _estimate(description, base, inputs)
        estimates.append(estimate)
        files = len({part.file for one in inputs for part in one.block.parts})
        figures = (estimate.stored / 1e6, estimate.packs / 1e6, estimate.seconds / 60 / workers)
        table.add_row(source.name, source.format, f"{files:,}", f"{len(inputs):,}", *(f"{x:,.1f}" for x in figures))
    console.print(table)
    packs, seconds = sum(e.packs for e in estimates), sum(e.seconds for e in estimates)
    free = shutil.disk_usage(next(folder for folder in out.absolute().parents if folder.is_dir())).free
    console.print(
        f"{packs / 1e9:,.2f} GB of packs, twice as much disk on the way ({free / 1e9:,.1f} GB are free); "
        f"{seconds / 60 / workers:,.1f} minutes with {workers} workers. Duplicates and the training of a tokenizer are "
        "not counted",
        highlight=False,
        soft_wrap=True,
    )


def _estimate(description: CorpusDescription, base: Path, inputs: list[Input]) -> Estimate:
    source, stored = description.sources[inputs[0].source], sum(one.bytes for one in inputs)
    block = next(iter(READERS[source.format].blocks(source, base, SAMPLE)))
    text = kept = sides = 0
    started = time.process_time()
    for item in Texts(description, base, source, block):
        sizes = [len(one.encode()) for one in texts_of(item)]
        text += sum(sizes)
        if not isinstance(item, Row) or len(sizes) > 1:
            kept, sides = kept + sum(sizes), sides + len(sizes)
        if text > 2 * SAMPLE:  # of a block that is a whole file
            break
    seconds = time.process_time() - started
    part = block.parts[0]
    if text > 2 * SAMPLE or is_dense(part.file):
        read = text / expansion(part.file)
    else:
        read = sum(part.end - part.start for part in block.parts)
    scale = stored / max(1.0, read)
    token = 2 if (description.tokenizer.vocab_size or 2**32) <= 2**16 else 4
    packs = (token * kept / PIECE + SIDE * sides) * (2 if source.mono else 1)
    return Estimate(stored, scale * packs, scale * STAGES * seconds)
