"""Writes a corpus description, a recipe and held-out pairs for a user's own translations: `infoxlm init`."""

from __future__ import annotations

import heapq
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

import yaml

from data_prep.description import FORMATS, SourceDescription, load_description
from data_prep.filters.languages import scripts
from data_prep.inputs import LARGEST_BLOCK
from data_prep.rows import Fault, Row
from data_prep.sources import READERS
from data_prep.sources.files import COMPRESSED
from infoxlm_ds.atomic import write_file
from infoxlm_ds.config import UserError
from infoxlm_ds.data.packs import text_id
from infoxlm_ds.reading import check, load_recipe

FORMAT_OF = {".jsonl": "jsonl", ".tsv": "tsv", ".tmx": "tmx", ".zip": "opus"}
LEAST_PAIRS = 100
MOST_HELD_OUT, SHARE_HELD_OUT = 500, 20  # rows; one in so many
FILES = ("corpus.yaml", "recipe.yaml", "dev.jsonl")


class Base(NamedTuple):
    """A model to start from: a Hugging Face folder or a name on its hub, its layers, and the longest sequence that it
    takes."""

    name: str
    layers: int
    positions: int


class Counted(NamedTuple):
    """What is in the files. `held_out`: rows chosen by a hash of their text, so that the same files give the same."""

    rows: int
    characters: int
    alphabet: int
    languages: tuple[str, ...]
    held_out: list[dict[str, str]]

    @property
    def pivot(self) -> str:
        """The language that others are compared and paired with."""
        return "en" if "en" in self.languages else self.languages[0]


def init(folder: Path, files: Sequence[Path], languages: Sequence[str], base: Base | None, gpus: int) -> Counted:
    """Write `corpus.yaml`, `recipe.yaml` and `dev.jsonl` into `folder`, for this machine's number of GPUs. UserError if
    one of them exists, or if the files are not parallel text."""
    for name in FILES:
        if (folder / name).exists():
            raise UserError(f"{folder / name} exists: remove it or choose another folder")
    source = source_of(files, languages)
    counted = count_rows(source, languages)
    source["kind"] = "nway" if len(counted.languages) > 2 else "para"
    source["name"] = f"{source['kind']}.own"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"key": str(number), "text": texts} for number, texts in enumerate(counted.held_out, 1)]
    write_file(folder / "dev.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_file(folder / "corpus.yaml", corpus_text(folder, source, languages, counted, base))
    write_file(folder / "recipe.yaml", recipe_text(folder.absolute(), counted, base, gpus))
    load_description(folder / "corpus.yaml")
    load_recipe(folder / "recipe.yaml")
    return counted


def source_of(files: Sequence[Path], languages: Sequence[str]) -> dict[str, object]:
    """The entry of a corpus description for aligned files, one a language, or for one file with all languages."""
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file")
    paths = [str(file.absolute()) for file in files]
    source: dict[str, object] = {"name": "nway.own", "kind": "nway", "mono": True}
    if len(paths) > 1:
        if len(languages) != len(paths) or len(set(languages)) != len(paths):
            raise UserError(f"{len(paths)} files: name the language of each, each once, such as --languages en,sw")
        return source | {"format": "moses", "paths": dict(zip(languages, paths, strict=True))}
    suffixes = [suffix for suffix in files[0].suffixes if suffix not in COMPRESSED]
    form = FORMAT_OF.get(suffixes[-1] if suffixes else "")
    if form is None:
        raise UserError(
            f"{files[0]}: give two files or more, one for each language, or one file that ends with "
            f"{', '.join(FORMAT_OF)}"
        )
    if form != "tsv":
        return source | {"format": form, "path": paths[0]}
    if len(languages) < 2:
        raise UserError(f"{files[0]}: name the language of each column, such as --languages en,sw")
    return source | {"format": form, "path": paths[0], "languages": list(languages)}


def count_rows(source: dict[str, object], wanted: Sequence[str]) -> Counted:
    """Read all rows. UserError for the first line that cannot be used, or if there are too few rows."""
    languages: Counter[str] = Counter()
    alphabet: set[str] = set()
    rows = characters = 0

    def keyed() -> Iterator[tuple[int, int, dict[str, str]]]:
        nonlocal rows, characters
        numbers = count()
        for texts in _read(source, wanted):
            rows += 1
            languages.update(texts.keys())  # of a mapping, a Counter would add the values
            for text in texts.values():
                characters += len(text)
                alphabet.update(text)
            yield text_id("\t".join(texts.values())), next(numbers), texts

    smallest = heapq.nsmallest(MOST_HELD_OUT, keyed())
    if not rows:
        raise UserError(
            f"no row has two languages: give at least {LEAST_PAIRS} rows, and correct --languages if it is wrong"
        )
    if missing := [code for code in wanted if code not in languages]:
        raise UserError(f"no row has {', '.join(missing)} beside another language: correct --languages")
    if rows < LEAST_PAIRS:
        raise UserError(f"only {rows} rows have two languages: give at least {LEAST_PAIRS}")
    differing = {key: texts for key, _, texts in smallest}
    held_out = list(differing.values())[: rows // SHARE_HELD_OUT]
    return Counted(rows, characters, len(alphabet), tuple(sorted(languages)), held_out)


def _read(source: dict[str, object], wanted: Sequence[str]) -> Iterator[dict[str, str]]:
    """The rows with two languages or more, of the wanted ones."""
    described = check(SourceDescription, source, "the files")
    reader = READERS[described.format]
    for block in reader.blocks(described, Path(), LARGEST_BLOCK):
        for item in reader.read(described, block):
            if isinstance(item, Fault):
                raise UserError(f"{item.place}: {item.what}: correct or remove the line")
            if isinstance(item, Row):
                texts = {code: text for code, text in item.texts.items() if not wanted or code in wanted}
                if len(texts) > 1:
                    yield texts


def corpus_text(
    folder: Path, source: dict[str, object], languages: Sequence[str], counted: Counted, base: Base | None
) -> str:
    """The corpus description. A trained vocabulary has all characters, and a piece for each 100 characters of text."""
    size = min(32_000, counted.alphabet + max(200, counted.characters // 100))
    folder_of = Path(base.name).absolute() if base and Path(base.name).is_dir() else None
    tokenizer = {"path": str(folder_of or base.name)} if base else {"vocab_size": size}
    tree = {
        "name": re.sub(r"[^A-Za-z0-9._-]", "-", folder.absolute().name).lstrip("._-") or "own",
        "max_tokens": longest(base),
        **({"languages": list(languages)} if languages and not FORMATS[str(source["format"])].needs[1:] else {}),
        "filters": {"reference": counted.pivot, "held_out": {"files": ["dev.jsonl"]}},
        "tokenizer": tokenizer,
        "sources": [source],
    }
    note = "# Written by `infoxlm init`, for `infoxlm prep build`. The texts of dev.jsonl stay out of the corpus.\n"
    return note + yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)


def longest(base: Base | None) -> int:
    """Pieces of a side, so that a pair with four special tokens fits in the model."""
    return min(254, (base.positions - 4) // 2) if base else 126


def recipe_text(folder: Path, counted: Counted, base: Base | None, gpus: int) -> str:
    """The recipe. Its sizes follow the amount of text and the number of GPUs; 0 means that CPU ranks train."""
    lanes = gpus * -(-8 // gpus) if gpus else 2
    rows = counted.rows - len(counted.held_out)
    pairs = max(8, min(128 if gpus else 192, rows // (20 * lanes)))
    passes, rate = (4, "5.0e-5") if base else (20, "1.0e-3")
    steps = max(200, min(100_000, passes * rows // (lanes * pairs)))
    tokens = 8192 if gpus else 2 * (2 * longest(base) + 4)
    return f"""\
# Written by `infoxlm init` for {counted.rows:,} rows of {", ".join(counted.languages)}.
run: {_quoted(folder / "run")}
corpus: {_quoted(folder / "corpus")} # infoxlm prep build {folder / "corpus.yaml"} {folder / "corpus"}
engine: {"zero1_bf16" if gpus else "zero1_fp32"} # on GPUs zero1_bf16, on CPUs zero1_fp32
preset: strong # trained keys, all pairs of a step as negatives, both directions, cosines
seed: 1

model:{_model(base, bool(gpus) and rows > 200_000)}
  pooling: mean
  projection: false

contrast:
  temperature: 0.05

batch: # sizes of a lane, which is one micro-batch; the number of GPUs must divide the lanes
  lanes: {lanes}
  mmlm_tokens: {tokens}
  tlm_tokens: {tokens}
  xlco_pairs: {pairs}

sampling:
  alpha: 0.7
  window_packs: 4{_pairing(counted)}

optimizer:
  learning_rate: {rate}
  steps: {steps} # about {max(1, round(steps * lanes * pairs / rows))} passes over the rows
  warmup: {max(1, min(2000, steps // 10))}

log: {{every: 10}}
checkpoint: {{every: {max(50, min(2000, steps // 10))}}}
probe: # measures retrieval on rows that are not in the corpus
  data: {_quoted(folder / "dev.jsonl")}
  pivot: {counted.pivot}
  every: {max(50, min(2000, steps // 10))}
"""


def _pairing(counted: Counted) -> str:
    """The keys about rows with more than two languages, of which a run draws a pair at a time."""
    if len(counted.languages) == 2:
        return ""
    return f"\n  pivot: {counted.pivot} # one side of the drawn pair ...\n  pivot_share: 0.5 # ... so often"


def _model(base: Base | None, large: bool) -> str:
    if base:
        name = Path(base.name).absolute() if Path(base.name).is_dir() else base.name
        universal = max(1, round(base.layers * 2 / 3))
        return (
            f"\n  init: {_quoted(name)}\n  universal_layer: {universal} # the contrast reads the output of this layer"
        )
    layers, width, heads, universal = (6, 512, 8, 4) if large else (2, 256, 4, 1)
    return f"""
  layers: {layers}
  width: {width}
  heads: {heads}
  feed_forward: {4 * width}
  positions: 256
  universal_layer: {universal} # the contrast reads this layer's output"""


def next_commands(folder: Path, counted: Counted) -> str:
    """What was done, and what to do next."""
    model, dev = folder / "model", folder / "dev.jsonl"
    unknown = ", ".join(code for code in counted.languages if not scripts(code))
    note = f"{unknown}: no known code (en, sw, zh_TW are); the script of these texts is not checked\n"
    done = f"{counted.rows:,} rows of {', '.join(counted.languages)}; {len(counted.held_out)} are held out, in {dev}"
    return f"""\
{note * bool(unknown)}{folder}: {done}. Next:
  infoxlm prep build {folder / "corpus.yaml"} {folder / "corpus"}
  infoxlm train {folder / "recipe.yaml"}
  infoxlm export {folder / "run"} {model}
  infoxlm eval retrieval --model {model} --data {dev} --pivot {counted.pivot} --min-pairs 2"""


def _quoted(text: Path | str) -> str:
    """A text as a YAML value."""
    return json.dumps(str(text), ensure_ascii=False)
