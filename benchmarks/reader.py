"""Compares reading a corpus in shuffled order with other readers of the same rows. Prints a table.
`python -m benchmarks.reader`

Rows are the monolingual sentences of the embedded corpus (short), and blocks of up to 126 pieces of the same text
(long). Ours: `StreamReader`, with its permutation of packs, shuffled windows and checks of each pack. Peers that keep
one sample a row: WebDataset with a buffer of 1,000. Peers that hold our packs, if they are installed: Hugging Face
`datasets` in random order, litdata and mosaicml-streaming with shuffle. A reader counts once it has given each row as
an array of ids, ours and those of packs as one array and lengths. Files are in the system's cache. Each reader has its
own process; they run in turn; CPU seconds, median of the rounds.
"""

from __future__ import annotations

import argparse
import importlib
import io
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import RUNS, corpus_of
from infoxlm_ds.atomic import new_folder
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.mixture import Mixture
from infoxlm_ds.data.order import Stage
from infoxlm_ds.data.stream import StreamReader

FOLDER = RUNS / "reader"
Job = Callable[[], tuple[int, int]]  # the rows and tokens that were read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for name, kind in (("short", "short"), ("long", "blocks-126")):
        corpus, folder = corpus_of(kind), FOLDER / name
        readers: dict[str, Job] = {"StreamReader": partial(_ours, corpus)}
        for peer, (module, write, read) in PEERS.items():
            if not _apart(partial(_imports, module))[0]:
                print(f"{peer}: {module} cannot be imported here")
                continue
            if not (folder / peer).is_dir():
                with new_folder(folder / peer) as new:
                    new.rmdir()  # some writers make it
                    _apart(partial(write, new, corpus))
            readers[peer] = partial(read, folder / peer)
        _compare(name, readers, options.rounds)


def _imports(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _compare(name: str, readers: dict[str, Job], rounds: int) -> None:
    seconds: dict[str, list[float]] = {reader: [] for reader in readers}
    counts: dict[str, tuple[int, int]] = {}
    for _ in range(rounds):
        for reader, read in readers.items():
            counts[reader], spent = _apart(read)
            seconds[reader].append(spent)
    print(f"\n### {name}\n\n| reader | rows a CPU s | M tokens a CPU s | ours against it |\n|---|---|---|---|")
    ours = seconds["StreamReader"]
    for reader, of_reader in seconds.items():
        rows, tokens = counts[reader]
        middle = statistics.median(of_reader)
        # The readers do not take exactly as many rows: compare what one row costs.
        ratio = (
            statistics.median(b / a for a, b in zip(ours, of_reader, strict=True)) * counts["StreamReader"][0] / rows
        )
        print(f"| {reader} | {rows / middle:,.0f} | {tokens / middle / 1e6:.2f} | {ratio:.2f} |", flush=True)


def _apart(job: Callable[[], Any]) -> tuple[Any, float]:
    """What a job returns in a process of its own, and its CPU seconds."""
    ours, theirs = multiprocessing.Pipe()

    def work() -> None:
        started = time.process_time()
        value = job()
        theirs.send((value, time.process_time() - started))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    theirs.close()
    answer: tuple[Any, float] = ours.recv()
    process.join()
    return answer


def _packs(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids and lengths of 512 rows."""
    corpus = Corpus(path)
    for number, source in enumerate(corpus.sources):
        if source.kind == "mono":
            for pack in range(source.packs):
                read = corpus.pack(number, pack)
                yield read.ids, read.lengths[0]


def _ours(path: Path) -> tuple[int, int]:
    corpus = Corpus(path)
    numbers = [number for number, source in enumerate(corpus.sources) if source.kind == "mono"]
    shares = np.array([corpus.sources[number].items for number in numbers], float)
    mixture = Mixture(tuple(numbers), (Stage(0, shares),))
    reader = StreamReader(corpus, "mmlm", seed=1, mixture=mixture, lanes=1, own_lanes=[0], window_packs=16)
    rows = tokens = 0
    while rows < reader.items:
        taken = reader.take(0, tokens=65_536)
        rows, tokens = rows + len(taken), tokens + int(taken.lengths.sum())
    return rows, tokens


def _write_webdataset(folder: Path, corpus: Path) -> None:
    import webdataset

    folder.mkdir(parents=True)
    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=20_000, verbose=0) as writer:
        number = 0
        for ids, lengths in _packs(corpus):
            for row in np.split(ids, np.cumsum(lengths)[:-1]):
                out = io.BytesIO()
                np.save(out, row)
                writer.write({"__key__": f"{number:08d}", "ids.npy": out.getvalue()})
                number += 1


def _read_webdataset(folder: Path) -> tuple[int, int]:
    import webdataset

    shards = sorted(map(str, folder.glob("*.tar")))
    rows = tokens = 0
    for sample in webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000).decode():
        rows, tokens = rows + 1, tokens + len(sample["ids.npy"])
    return rows, tokens


def _write_datasets(folder: Path, corpus: Path) -> None:
    from datasets.arrow_writer import ArrowWriter

    folder.mkdir(parents=True)
    with ArrowWriter(path=str(folder / "packs.arrow")) as writer:
        for ids, lengths in _packs(corpus):
            writer.write({"ids": ids, "lengths": lengths})
        writer.finalize()


def _read_datasets(folder: Path) -> tuple[int, int]:
    from datasets import Dataset

    data = Dataset.from_file(str(folder / "packs.arrow")).with_format("numpy")
    rows = tokens = 0
    for number in np.random.default_rng(1).permutation(len(data)).tolist():
        pack = data[number]
        rows, tokens = rows + len(pack["lengths"]), tokens + len(pack["ids"])
    return rows, tokens


def _write_litdata(folder: Path, corpus: Path) -> None:
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir(parents=True)
    writer = BinaryWriter(str(folder), chunk_bytes=2**26)
    for number, (ids, lengths) in enumerate(_packs(corpus)):
        writer[number] = {"ids": ids, "lengths": lengths}
    writer.done()
    writer.merge()


def _read_litdata(folder: Path) -> tuple[int, int]:
    from litdata import StreamingDataset

    rows = tokens = 0
    for pack in StreamingDataset(str(folder), shuffle=True):
        rows, tokens = rows + len(pack["lengths"]), tokens + len(pack["ids"])
    return rows, tokens


def _write_streaming(folder: Path, corpus: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"ids": "ndarray:uint32", "lengths": "ndarray:uint16"}) as writer:
        for ids, lengths in _packs(corpus):
            writer.write({"ids": ids, "lengths": lengths})


def _read_streaming(folder: Path) -> tuple[int, int]:
    from streaming import StreamingDataset

    rows = tokens = 0
    for pack in StreamingDataset(local=str(folder), shuffle=True, batch_size=1):
        rows, tokens = rows + len(pack["lengths"]), tokens + len(pack["ids"])
    return rows, tokens


PEERS = {
    "WebDataset, a sample a row": ("webdataset", _write_webdataset, _read_webdataset),
    "datasets, our packs": ("datasets", _write_datasets, _read_datasets),
    "litdata, our packs": ("litdata", _write_litdata, _read_litdata),
    "mosaicml-streaming, our packs": ("streaming", _write_streaming, _read_streaming),
}


if __name__ == "__main__":
    main()
