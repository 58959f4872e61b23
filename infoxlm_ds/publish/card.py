"""The model card of an export: README.md, as the hub of Hugging Face shows it. Everything in it comes from the run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.data.manifest import load_manifest
from infoxlm_ds.monitor.history import METRICS, History, read_history
from infoxlm_ds.monitor.starts import read_starts
from infoxlm_ds.monitor.tags import TASKS
from infoxlm_ds.publish.compute import hours, operations
from infoxlm_ds.publish.curves import CURVES, MISSING, can_draw, write_curves
from infoxlm_ds.publish.origins import Origin, licence_of, origins_of
from infoxlm_ds.publish.trained import Trained
from infoxlm_ds.publish.usage import usage

CARD = "README.md"
SMALL = 250e6  # parameters
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
        write_curves(history, folder / CURVES)
    (folder / CARD).write_text(card(facts, drawn), encoding="utf-8")
    if not history.rows:
        return f"without curves and results, as {run / METRICS} has no line that can be read"
    return "" if drawn else f"without a picture of the curves, as matplotlib is not installed: {MISSING}"


def card(facts: Facts, drawn: bool) -> str:
    """The whole text."""
    parts = [
        _metadata(facts),
        f"# {facts.name}",
        _what_it_is(facts),
        "## How to use it",
        *usage(facts.name, facts.forms, facts.trained.vector),
        "## Results",
        _results(facts),
        *([f"![Losses, bounds, retrieval and speed over the steps]({CURVES})"] if drawn else []),
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


def _metadata(facts: Facts) -> str:
    from huggingface_hub import ModelCardData

    init, languages = facts.trained.recipe.model.init, {re.split("[_-]", code)[0].lower() for code in _codes(facts)}
    data = ModelCardData(
        base_model=init if init and not _is_local(init) else None,
        language=sorted(code for code in languages if re.fullmatch("[a-z]{2,3}", code)) or None,
        license=licence_of(facts.origins),
        library_name="sentence-transformers" if "sentence-transformers" in facts.forms else "transformers",
        pipeline_tag="sentence-similarity",
        tags=["infoxlm", "cross-lingual", "multilingual", "feature-extraction"],
    )
    return f"---\n{data.to_yaml()}\n---"


def _is_local(model: str) -> bool:
    """Whether `model.init` is a folder, also one that is not there any more, and no name on the hub."""
    return Path(model).is_absolute() or Path(model).exists() or model.startswith(".") or model.count("/") > 1


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
    tasks = [TASKS[task] for task in facts.trained.recipe.used_tasks]
    parameters = sum(p.numel() for p in facts.trained.model.lm.parameters())
    start = facts.trained.recipe.model.init
    named = start and (Path(start).name if _is_local(start) else start)
    begun = (
        f"It began with the weights of `{named}`, which have a licence of their own."
        if named
        else "It began with random weights."
    )
    projection = ", times a trained projection," if vector.projected else ""
    is_universal = vector.layer == facts.trained.recipe.model.universal_layer
    universal = " (the universal layer, which the contrast reads)" if is_universal else ""
    return (
        f"A cross-lingual encoder ({config.model_type}: {config.num_hidden_layers} layers of width "
        f"{config.hidden_size}, {config.vocab_size:,} pieces, {parameters / 1e6:.1f}M parameters), trained with "
        f"{', '.join(tasks)} as in [InfoXLM](https://arxiv.org/abs/2007.07834). {begun} "
        f"Sentences that translate each other have vectors that lie close to each other. A sentence vector is the "
        f"{'mean over all tokens' if vector.pooling == 'mean' else 'first token'} of layer {vector.layer}"
        f"{universal}{projection} divided by its L2 norm; compare vectors by their cosine."
    )


def _results(facts: Facts) -> str:
    return "\n\n".join([*_losses(facts.history), *_retrieval(facts)]) or "Nothing was measured during training."


def _losses(history: History) -> list[str]:
    last = history.last("loss")
    if last is None:
        return []
    rows = [
        (label, f"{last[f'{task}/loss']:.3f}", _number(last.get(f"{task}/information_bound")))
        for task, label in TASKS.items()
        if f"{task}/loss" in last
    ]
    return [f"At step {last['step']}, in nats:", _table(("loss", "mean", "bound on mutual information"), rows)]


def _retrieval(facts: Facts) -> list[str]:
    probe, settings = facts.history.last("probe/mean"), facts.trained.recipe.probe
    if probe is None:
        return []
    scores = {name.removeprefix("probe/"): value for name, value in probe.items() if name.startswith("probe/")}
    trigrams, mean, _ = scores.pop("trigram_mean", None), scores.pop("mean"), scores.pop("best", None)
    rows = [(language, _number(value)) for language, value in sorted(scores.items())]
    on = ""
    if settings is not None:
        on = f" on `{settings.data.name}`, at most {settings.pairs} pairs with {settings.pivot} a language"
    text = (
        f"Held-out retrieval at step {probe['step']}{on}: accuracy@1, mean of both directions. The recipe chose these "
        "languages, and its settings may have been chosen on this text."
    )
    means = [("**mean**", f"**{_number(mean)}**"), ("mean of character trigrams, untrained", _number(trigrams))]
    return [text, _table(("language", "accuracy@1"), [*rows, *means])]


def _languages(facts: Facts) -> str:
    tasks = {task: counts for task, counts in facts.history.items.items() if counts.total()}
    if not tasks:
        codes = ", ".join(sorted(_codes(facts)))
        return f"The run's counts are missing. The corpus has {codes}." if codes else "The run's counts are missing."
    totals = {task: counts.total() for task, counts in tasks.items()}
    ordered = sorted(_codes(facts), key=lambda code: -sum(tasks[task][code] / totals[task] for task in tasks))
    rows = [(code, *(f"{tasks[task][code] / totals[task]:.1%}" for task in tasks)) for code in ordered]
    explained = "Shares of the texts that were read, by task; a pair counts for both its languages."
    return f"{explained}\n\n{_table(('language', *(TASKS[task] for task in tasks)), rows)}"


def _data(facts: Facts) -> str:
    if not facts.origins:
        return "The corpus was not there any more when this card was written."
    rows = [(o.name, o.license or "not stated", o.homepage or "not stated") for o in facts.origins]
    note = "The licence in this card's metadata is that of the texts, and `other` if they have several or state none."
    return f"{_table(('source', 'licence', 'where from'), rows)}\n\n{note}"


def _training(facts: Facts) -> str:
    history, state, recipe = facts.history, facts.state, facts.trained.recipe
    lines = [f"- {state['step']:,} of {recipe.optimizer.steps:,} steps"]
    if history.intervals:
        spent = hours(history, facts.run, state["world_size"])
        lines.append(f"- {history.tokens / 1e6:,.1f}M tokens of text, each counted as often as it was read")
        lines += [f"- {value:,.2f} rank hours on {device}" for device, value in spent.hours.items()]
        ranks = " or ".join(map(str, spent.ranks))
        lines.append(
            f"- {history.hours:,.2f} hours of the clock on {ranks} {'rank' if spent.ranks == [1] else 'ranks'}"
        )
        count = operations(history, recipe, state)
        if count is not None:
            lines.append(f"- {count:.2e} floating-point operations, estimated from the sizes of model and batches")
    for start in read_starts(facts.run)[-1:]:
        lines.append("- " + ", ".join(f"{name} {version}" for name, version in start.get("versions", {}).items()))
    text = yaml.safe_dump(_recipe(recipe), sort_keys=False, allow_unicode=True)
    return "\n".join(lines) + f"\n\n<details><summary>Recipe</summary>\n\n```yaml\n{text}```\n\n</details>"


def _recipe(recipe: Recipe) -> dict[str, Any]:
    """What differs from the defaults and decides about the model. Of files and folders it has the names only."""
    tree = recipe.model_dump(
        mode="json", exclude_defaults=True, exclude={"run", "corpus", "log", "checkpoint", "resume"}
    )
    tree["engine"] = recipe.engine.stem
    if recipe.probe is not None:
        tree["probe"]["data"] = recipe.probe.data.name
    if recipe.model.init and _is_local(recipe.model.init):
        tree["model"]["init"] = Path(recipe.model.init).name
    return tree


def _limits(facts: Facts) -> str:
    measured = facts.history.last("probe/mean") is not None
    retrieval = "Retrieval was measured on the text named above only." if measured else "Retrieval was not measured."
    parameters = sum(p.numel() for p in facts.trained.model.lm.parameters())
    lines = [
        f"A text of more than {facts.trained.positions} tokens is cut.",
        f"It has {parameters / 1e6:.1f}M parameters; XLM-R base has 278M." if parameters < SMALL else "",
        "Other languages than those above were not trained by this run; few texts of a language teach little of it.",
        f"{retrieval} Other kinds of text and tasks such as classification were not measured.",
        "The model repeats the prejudices and errors of its texts. No one has looked for them here.",
    ]
    return "\n".join(f"- {line}" for line in lines if line)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
