"""Compares the preparation of a corpus with `datasets.map`, and shows how its memory grows. Prints two tables.
`python -m benchmarks.prep`

`speed`: n-way rows (by default those of the embedded corpus) from JSON lines to stored ids with the same tokenizer.
Ours also cleans, filters, drops duplicates and shuffles, with one worker; the peer tokenises and writes Arrow files.
They run in turn, each time in processes of their own; CPU seconds, median of the rounds. `growth`: pairs of random
words in two aligned files; memory is the largest sum over all processes, pages that they share counted once.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import psutil
import yaml

from benchmarks.cases import EMBEDDED, ROOT, RUNS, corpus_of

FOLDER = RUNS / "prep"
MAP = """
import sys, json
from datasets import load_dataset
from transformers import AutoTokenizer
rows, tokenizer, out = sys.argv[1:]
auto = AutoTokenizer.from_pretrained(tokenizer)
def encode(batch):
    texts = [[text for text in row.values() if text] for row in batch["text"]]
    ids = auto([text for row in texts for text in row], add_special_tokens=False)["input_ids"]
    at, found = 0, []
    for row in texts:
        found.append(ids[at : at + len(row)])
        at += len(row)
    return {"ids": found}
data = load_dataset("json", data_files=rows, split="train", cache_dir=out + ".cache")
data.map(encode, batched=True, remove_columns=data.column_names).save_to_disk(out)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="n-way JSON lines; default: the embedded corpus")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, nargs="*", default=[200_000, 2_000_000], help="sizes of `growth`")
    parser.add_argument("--workers", type=int, default=2, help="of `growth`")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if options.rounds:
        _speed(options.rows or _embedded(), options.rounds)
    _growth(options.pairs, options.workers)


def _speed(rows: Path, rounds: int) -> None:
    tokenizer, size = corpus_of("short") / "tokenizer", rows.stat().st_size / 1e6
    source = {"name": "nway.rows", "kind": "nway", "format": "jsonl", "path": str(rows)}
    ours = ["-m", "data_prep", "build", str(_describe(tokenizer, source)), str(FOLDER / "ours"), "--workers", "1"]
    peer = ["-c", MAP, str(rows), str(tokenizer), str(FOLDER / "peer")]
    seconds: dict[str, list[float]] = {"infoxlm prep build": [], "datasets.map": []}
    for _ in range(rounds):
        for of_one, arguments in zip(seconds.values(), (ours, peer), strict=True):
            of_one.append(_run(arguments).seconds)
            for left in ("ours", "peer", "peer.cache"):
                shutil.rmtree(FOLDER / left, ignore_errors=True)
    print(f"\n{size:.1f} MB\n\n| | CPU s | MB a CPU s | ratio |\n|---|---|---|---|")
    for name, of_one in seconds.items():
        middle = statistics.median(of_one)
        ratio = statistics.median(b / a for a, b in zip(seconds["infoxlm prep build"], of_one, strict=True))
        print(f"| {name} | {middle:.1f} | {size / middle:.2f} | {ratio:.2f} |", flush=True)


def _growth(sizes: Sequence[int], workers: int) -> None:
    print("\n| pairs | MB | CPU s | seconds | MB a CPU s | peak MB |\n|---|---|---|---|---|---|")
    for pairs in sizes:
        paths = {language: FOLDER / f"{pairs}.{language}" for language in ("en", "de")}
        for language, path in paths.items():
            _make_up(path, pairs, language)
        size = sum(path.stat().st_size for path in paths.values()) / 1e6
        source: dict[str, object] = {"name": "para.made-up", "kind": "para", "format": "moses"}
        description = _describe(
            corpus_of("short") / "tokenizer", source | {"paths": {k: str(v) for k, v in paths.items()}}
        )
        out = FOLDER / "ours"
        done = _run(["-m", "data_prep", "build", str(description), str(out), "--workers", str(workers)])
        shutil.rmtree(out)
        for path in paths.values():
            path.unlink()
        rate = size / done.seconds
        print(
            f"| {pairs:,} | {size:,.0f} | {done.seconds:,.0f} | {done.elapsed:,.0f} | {rate:.2f} | {done.peak:,.0f} |",
            flush=True,
        )


class _Done:
    """A finished process: CPU seconds of it and its children, seconds on the clock, and the peak of memory in MB."""

    def __init__(self, seconds: float, elapsed: float, peak: float) -> None:
        self.seconds, self.elapsed, self.peak = seconds, elapsed, peak


def _run(arguments: Sequence[str]) -> _Done:
    before, started, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic(), 0.0
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr or ()))
    reader.start()
    while process.poll() is None:
        peak = max(peak, _memory(process.pid))
        time.sleep(0.1)
    reader.join()
    if process.returncode:
        raise SystemExit("".join(said))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return _Done(seconds, time.monotonic() - started, peak / 1e6)


def _memory(number: int) -> float:
    try:
        root = psutil.Process(number)
        return float(sum(process.memory_full_info().pss for process in (root, *root.children(recursive=True))))
    except psutil.Error:  # one of them has just ended
        return 0.0


def _describe(tokenizer: Path, source: Mapping[str, object]) -> Path:
    path = FOLDER / "corpus.yaml"
    tree = {"name": "benchmark", "tokenizer": {"path": str(tokenizer)}, "sources": [dict(source)]}
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def _embedded() -> Path:
    path = FOLDER / "rows.jsonl"
    with lzma.open(EMBEDDED / "home_assistant.train.jsonl.xz", "rt", encoding="utf-8") as lines:
        rows = [{"text": json.loads(line)["text"]} for line in lines]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _make_up(path: Path, lines: int, language: str) -> None:
    """Sentences of 3 to 12 words of the embedded corpus, frequent ones more often."""
    with lzma.open(EMBEDDED / "home_assistant.train.jsonl.xz", "rt", encoding="utf-8") as rows:
        texts = [json.loads(row)["text"].get(language, "") for row in rows]
    words = [word for word, _ in Counter(" ".join(texts).split()).most_common()]
    rng = np.random.default_rng(len(language) + ord(language[0]))
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, lines, 100_000):
            lengths = rng.integers(3, 13, min(100_000, lines - start))
            chosen = (rng.random(int(lengths.sum())) ** 2 * len(words)).astype(int).tolist()
            ends = np.cumsum(lengths).tolist()
            cut = zip(ends, lengths.tolist(), strict=True)
            file.writelines(" ".join([words[i] for i in chosen[end - n : end]]) + "\n" for end, n in cut)


if __name__ == "__main__":
    main()
