"""The model card of an export: README.md, as the hub of Hugging Face shows it. Everything in it comes from the run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from infoxlm_ds.config import UserError
from infoxlm_ds.data.manifest import load_manifest
from infoxlm_ds.monitor.starts import read_starts
from infoxlm_ds.monitor.tags import TASKS
from infoxlm_ds.publish.compute import hours, operations
from infoxlm_ds.publish.curves import MISSING, NAME, can_draw, write_curves
from infoxlm_ds.publish.history import History, read_history
from infoxlm_ds.publish.trained import Trained

CARD = "README.md"
PAPER = """\
@inproceedings{chi-etal-2021-infoxlm,
  title = "{I}nfo{XLM}: An Information-Theoretic Framework for Cross-Lingual Language Model Pre-Training",
  author = "Chi, Zewen and Dong, Li and Wei, Furu and Yang, Nan and Singhal, Saksham and Wang, Wenhui and
    Song, Xia and Mao, Xian-Ling and Huang, Heyan and Zhou, Ming",
  booktitle = "Proceedings of NAACL-HLT 2021",
  year = "2021",
  note = "arXiv:2007.07834",
}"""


@dataclass(frozen=True)
class Origin:
    """A source of texts as CORPUS.yaml describes it. An empty string: not stated."""

    name: str
    license: str
    homepage: str


@dataclass(frozen=True)
class Facts:
    """What a card is written from. `state`: the checkpoint's state.json."""

    name: str
    forms: Sequence[str]
    trained: Trained
    run: Path
    state: dict[str, Any]
    history: History
    origins: list[Origin]


def write_card(
    folder: Path, out: Path, forms: Sequence[str], trained: Trained, run: Path, state: dict[str, Any]
) -> str:
    """Write the card and, if matplotlib is installed, the picture of the run's curves into `folder`, which will be
    named `out`. Returns what is missing, or an empty string."""
    history = read_history(run, state["step"])
    facts = Facts(out.name, forms, trained, run, state, history, origins_of(trained.recipe.corpus))
    drawn = bool(history.rows) and can_draw()
    if drawn:
        write_curves(history, folder / NAME)
    (folder / CARD).write_text(card(facts, drawn), encoding="utf-8")
    if not history.rows:
        return f"without curves and results, as {run / 'metrics.jsonl'} has no line that can be read"
    return "" if drawn else f"without a picture of the curves, as matplotlib is not installed: {MISSING}"


def card(facts: Facts, drawn: bool) -> str:
    """The whole text."""
    parts = [
        _metadata(facts),
        f"# {facts.name}",
        _what_it_is(facts),
        "## How to use it",
        *_uses(facts),
        "## Results",
        _results(facts),
        *([f"![Losses, bounds, retrieval and speed over the steps]({NAME})"] if drawn else []),
        "## Languages",
        _languages(facts),
        "## Data",
        _data(facts),
        "## Training",
        _training(facts),
        "## Limits",
        _limits(facts),
        "## Citation",
        f"```bibtex\n{PAPER}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def origins_of(corpus: Any) -> list[Origin]:
    """The sources that a corpus was built from. Empty if it is not there any more."""
    try:
        prep = load_manifest(corpus).prep
    except (UserError, OSError):
        return []
    return [
        Origin(source["name"], source.get("license") or "", source.get("homepage") or "")
        for description in _descriptions(prep)
        for source in description["sources"]
    ]


def _descriptions(prep: dict[str, Any]) -> Iterable[dict[str, Any]]:
    for part in prep.get("merged", ()):
        yield from _descriptions(part["prep"])
    if "description" in prep:
        yield prep["description"]


def licence_of(origins: Sequence[Origin]) -> str:
    """The licence of the data if all sources state the same one, in the hub's spelling, else other."""
    stated = {origin.license.lower() for origin in origins}
    return stated.pop() if len(stated) == 1 and "" not in stated else "other"


def _metadata(facts: Facts) -> str:
    from huggingface_hub import ModelCardData

    languages = sorted({re.split("[_-]", code)[0].lower() for code in _codes(facts)})
    data = ModelCardData(
        language=[code for code in languages if re.fullmatch("[a-z]{2,3}", code)],
        license=licence_of(facts.origins),
        library_name="sentence-transformers" if "sentence-transformers" in facts.forms else "transformers",
        pipeline_tag="sentence-similarity",
        tags=["infoxlm", "cross-lingual", "multilingual", "feature-extraction", "fill-mask"],
    )
    return f"---\n{data.to_yaml()}\n---"


def _codes(facts: Facts) -> set[str]:
    counted = {code for counts in facts.history.items.values() for code in counts}
    if counted:
        return counted
    try:
        return {code for source in load_manifest(facts.trained.recipe.corpus).sources for code in source.languages}
    except (UserError, OSError):
        return set()


def _what_it_is(facts: Facts) -> str:
    config, vector = facts.trained.model.lm.config, facts.trained.vector
    tasks = [TASKS[task] for task, used in facts.trained.recipe.tasks.items() if used]
    parameters = sum(p.numel() for p in facts.trained.model.lm.parameters())
    start = facts.trained.recipe.model.init
    begun = f"It began with the weights of `{start}`." if start else "It began with random weights."
    projection = ", times a trained projection," if vector.projected else ""
    return (
        f"A cross-lingual encoder ({config.model_type}: {config.num_hidden_layers} layers of width "
        f"{config.hidden_size}, {config.vocab_size:,} pieces, {parameters / 1e6:.1f}M parameters), trained with "
        f"{', '.join(tasks)} as in [InfoXLM](https://arxiv.org/abs/2007.07834). {begun} "
        f"Sentences that translate each other have vectors that lie close to each other. A sentence vector is the "
        f"{'mean over all tokens' if vector.pooling == 'mean' else 'first token'} of layer {vector.layers[0]}"
        f"{projection} divided by its L2 norm; compare vectors by their cosine."
    )


def _uses(facts: Facts) -> Iterable[str]:
    name, vector = facts.name, facts.trained.vector
    sentences = '["Open the door.", "Öffne die Tür."]'
    if "sentence-transformers" in facts.forms:
        yield "With sentence-transformers:"
        yield f"""```python
from sentence_transformers import SentenceTransformer

vectors = SentenceTransformer("{name}").encode({sentences})
print(vectors @ vectors.T)
```"""
    if "hf" in facts.forms:
        pooled = "(states * mask).sum(1) / mask.sum(1)" if vector.pooling == "mean" else "states[:, 0]"
        project, load = "", ""
        if vector.projected:
            load = "from safetensors.torch import load_file\n"
            project = f'pooled = pooled @ load_file("{name}/projection.safetensors")["weight"].T\n'
        yield f"With transformers alone, in the folder above `{name}`:"
        yield f"""```python
import torch
{load}from transformers import AutoModel, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("{name}/encoder"), AutoModel.from_pretrained("{name}/encoder")
inputs = tokenizer({sentences}, padding=True, truncation=True, return_tensors="pt")
mask = inputs["attention_mask"][:, :, None]
with torch.no_grad():
    states = model(**inputs, output_hidden_states=True).hidden_states[{vector.layers[0]}]
pooled = {pooled}
{project}vectors = torch.nn.functional.normalize(pooled, dim=1).numpy()
print(vectors @ vectors.T)
```"""
        yield f"`AutoModel` and the like load `{name}/encoder`, to fine-tune it; `AutoModelForMaskedLM` loads `{name}`."
    if "onnx" in facts.forms:
        yield "With onnxruntime:"
        yield f"""```python
import onnxruntime
from transformers import AutoTokenizer

session, tokenizer = onnxruntime.InferenceSession("{name}/onnx/model.onnx"), AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer({sentences}, padding=True, truncation=True, return_tensors="np")
(vectors,) = session.run(None, {{key: inputs[key] for key in ("input_ids", "attention_mask")}})
print(vectors @ vectors.T)
```"""


def _results(facts: Facts) -> str:
    probe, last = facts.history.last("probe/mean"), facts.history.last("loss")
    lines, rows = list[str](), list[Sequence[str]]()
    if last:
        rows = [
            (TASKS[task], f"{last[f'{task}/loss']:.3f}", _number(last.get(f"{task}/information_bound")))
            for task in TASKS
            if f"{task}/loss" in last
        ]
        lines += [f"At step {last['step']}, in nats:", _table(("loss", "mean", "bound on mutual information"), rows)]
    data = facts.trained.recipe.probe
    if probe and data:
        scores = {name.removeprefix("probe/"): value for name, value in probe.items() if name.startswith("probe/")}
        trigrams, mean, _ = (scores.pop(name, None) for name in ("trigram_mean", "mean", "best"))
        rows = [(language, f"{value:.3f}") for language, value in sorted(scores.items())]
        lines += [
            f"Held-out retrieval at step {probe['step']} on `{Path(data.data).name}`, at most {data.pairs} pairs with "
            f"{data.pivot} a language: accuracy@1, mean of both directions. Character trigrams, untrained, have a mean "
            f"of {_number(trigrams)}. The recipe chose the languages, and may have chosen settings on this text.",
            _table(("language", "accuracy@1"), [*rows, ("**mean**", f"**{_number(mean)}**")]),
        ]
    return "\n\n".join(lines) or "Nothing was measured during training."


def _languages(facts: Facts) -> str:
    tasks = facts.history.items
    if not tasks:
        codes = ", ".join(sorted(_codes(facts)))
        return f"The run's counts are missing. The corpus has {codes}." if codes else "The run's counts are missing."
    totals = {task: sum(counts.values()) for task, counts in tasks.items()}
    ordered = sorted(_codes(facts), key=lambda code: -sum(tasks[task][code] / totals[task] for task in tasks))
    rows = [(code, *(f"{tasks[task][code] / totals[task]:.1%}" for task in tasks)) for code in ordered]
    explained = "Shares of the texts that were read, by task; a pair counts for both its languages."
    return f"{explained}\n\n{_table(('language', *(TASKS[task] for task in tasks)), rows)}"


def _data(facts: Facts) -> str:
    if not facts.origins:
        return "The corpus was not there any more when this card was written."
    rows = [(o.name, o.license or "not stated", o.homepage or "not stated") for o in facts.origins]
    return _table(("source", "licence", "where from"), rows)


def _training(facts: Facts) -> str:
    history, state, recipe = facts.history, facts.state, facts.trained.recipe
    lines = [f"- {state['step']:,} of {recipe.optimizer.steps:,} steps"]
    if history.intervals:
        spent = hours(history, facts.run, state["world_size"])
        lines.append(f"- {history.tokens / 1e6:,.1f}M tokens of text, each counted as often as it was read")
        lines += [f"- {value:,.2f} rank hours on {device}" for device, value in spent.hours.items()]
        lines.append(f"- {history.hours:,.2f} hours of the clock on {' or '.join(map(str, spent.ranks))} rank(s)")
        count = operations(history, recipe, state)
        if count is not None:
            lines.append(f"- {count:.2e} floating-point operations, estimated from the sizes of model and batches")
    for start in read_starts(facts.run)[-1:]:
        lines.append("- " + ", ".join(f"{name} {version}" for name, version in start.get("versions", {}).items()))
    tree = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"run", "corpus", "log", "checkpoint"})
    if "probe" in tree:
        tree["probe"]["data"] = Path(tree["probe"]["data"]).name
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    return "\n".join(lines) + f"\n\n<details><summary>Recipe</summary>\n\n```yaml\n{text}```\n\n</details>"


def _limits(facts: Facts) -> str:
    return "\n".join(
        (
            f"- A text of more than {facts.trained.positions} tokens is cut.",
            "- Languages that are not in the table above were not trained; few texts of a language teach little of it.",
            "- Retrieval was measured on the text named above only. Other kinds of text and tasks such as "
            "classification were not measured.",
            "- The model repeats the prejudices and errors of its texts. No one has looked for them here.",
        )
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
