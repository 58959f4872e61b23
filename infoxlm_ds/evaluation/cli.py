"""`infoxlm eval <verb>`, and the verbs `embed`, `mine` and `finetune` of `infoxlm`. A verb imports its modules when it
runs, so that --help is fast."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from infoxlm_ds.config import Pooling, UserError

app = typer.Typer(help="Measure a model.", no_args_is_help=True)
Model = Annotated[Path, typer.Option(help="A model folder in Hugging Face format.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: a GPU if there is one.")]
Pivot = Annotated[str, typer.Option(help="The language that is paired with all others.")]
Poolings = Annotated[
    Literal["mean", "cls", "both"] | None, typer.Option(help="Default: from the model's config, else mean.")
]
MinPairs = Annotated[int, typer.Option(min=1, help="Leave out languages with fewer pairs.")]
Json = Annotated[Path | None, typer.Option(help="Also write the rows here.")]
Score = Literal["cosine", "ratio", "distance", "csls"]


@app.command()
def retrieval(
    model: Model,
    data: Annotated[
        list[Path],
        typer.Option(
            help="Parallel text: JSON lines, TSV, PREFIX.de-en.de, or a folder of such pairs; may be repeated."
        ),
    ],
    pivot: Pivot = "en",
    layer: Annotated[
        str, typer.Option(help="Number (0: embeddings) or all. Default: the universal layer, else the last.")
    ] = "",
    pooling: Poolings = None,
    score: Annotated[Score, typer.Option(help="Compare cosines, or cosines with those of near neighbours.")] = "cosine",
    languages: Annotated[
        str, typer.Option(help="Only these, separated by commas; zh includes every zh_*. Default: all.")
    ] = "",
    min_pairs: MinPairs = 50,
    beside: Annotated[
        list[str] | None,
        typer.Option(help="Another model on the same pairs: any that sentence-transformers loads; may be repeated."),
    ] = None,
    json: Json = None,
) -> None:
    """Measure how often a sentence's nearest neighbour is its translation (accuracy@1), beside a trigram baseline."""
    from rich.console import Console

    from infoxlm_ds.evaluation.beside import OtherModel
    from infoxlm_ds.evaluation.embed import SentenceEmbedder
    from infoxlm_ds.evaluation.output import check_writable, write_json
    from infoxlm_ds.evaluation.parallel import read_pairs
    from infoxlm_ds.evaluation.results import evaluate_all
    from infoxlm_ds.evaluation.tables import as_json, print_comparison, print_tables

    if beside and (layer == "all" or pooling == "both"):
        raise UserError("--beside compares one vector of each model: give one --layer and one --pooling")
    check_writable(json)
    pairs = read_pairs(data, pivot, _codes(languages), min_pairs)
    embedder = SentenceEmbedder(model, _layer(layer), pooling, half=True)
    rivals = {name: OtherModel(name) for name in beside or []}  # before any work, which a wrong name would waste
    ours = evaluate_all(embedder, pairs, score)
    others = {name: evaluate_all(rival, pairs, score) for name, rival in rivals.items()}
    print_tables(ours, Console())
    if others:
        print_comparison(
            {f"ours: {model.name}": ours.rows} | {name: other.rows for name, other in others.items()}, Console()
        )
    if json:
        write_json(json, as_json(ours, others))


@app.command()
def layers(
    model: Model,
    data: Annotated[list[Path], typer.Option(help="Parallel text, as for `eval retrieval`; may be repeated.")],
    pivot: Pivot = "en",
    pooling: Poolings = None,
    languages: Annotated[str, typer.Option(help="Only these, separated by commas. Default: all.")] = "",
    min_pairs: MinPairs = 50,
    json: Json = None,
) -> None:
    """Measure each layer: retrieval, how well it tells languages apart, how far apart they lie, anisotropy."""
    from rich.console import Console

    from infoxlm_ds.evaluation.embed import SentenceEmbedder
    from infoxlm_ds.evaluation.layers import evaluate_layers, print_layers
    from infoxlm_ds.evaluation.output import check_writable, write_json
    from infoxlm_ds.evaluation.parallel import read_pairs

    check_writable(json)
    pairs = read_pairs(data, pivot, _codes(languages), min_pairs)
    embedder = SentenceEmbedder(model, "all", pooling, half=True)
    results = {name: evaluate_layers(embedder, of_file) for name, of_file in pairs.items()}
    for name, rows in results.items():
        print_layers(name, rows, len(pairs[name]), Console())
    if json:
        write_json(json, results)


@app.command()
def alignment(
    model: Model,
    text: Annotated[tuple[Path, Path], typer.Option(help="Two files of sentences, words separated by spaces.")],
    gold: Annotated[Path, typer.Option(help="Lines such as 0-0 1p2, or SENTENCE WORD WORD [S|P].")],
    first: Annotated[int, typer.Option(min=0, max=1, help="The number of the first word in the gold file.")] = 0,
    layer: Annotated[str, typer.Option(help="Number (0: embeddings) or all.")] = "all",
    json: Json = None,
) -> None:
    """Measure word alignment: precision, recall and error rate of words whose states are each other's nearest."""
    from rich.console import Console

    from infoxlm_ds.evaluation.alignment import evaluate_alignment, print_alignment
    from infoxlm_ds.evaluation.output import check_writable, write_json

    check_writable(json)
    chosen = _layer(layer or "all")
    rows = evaluate_alignment(model, text, gold, first, None if chosen == "all" else chosen)
    print_alignment(rows, Console())
    if json:
        write_json(json, rows)


@app.command()
def bucc(
    model: Model,
    data: Annotated[Path, typer.Option(help="The folder of BUCC's files: de-en.training.de, .en, .gold and so on.")],
    tune: Annotated[str, typer.Option(help="The part that the threshold comes from.")] = "training",
    part: Annotated[str, typer.Option(help="The part that is measured.")] = "test",
    score: Annotated[Score, typer.Option(help="As for `infoxlm mine`.")] = "ratio",
    json: Json = None,
) -> None:
    """Measure how well translations are found among other sentences: precision, recall and F1 on BUCC."""
    from rich.console import Console

    from infoxlm_ds.evaluation.bucc import evaluate_bucc, print_bucc
    from infoxlm_ds.evaluation.embed import SentenceEmbedder
    from infoxlm_ds.evaluation.output import check_writable, write_json

    check_writable(json)
    rows = list(evaluate_bucc(SentenceEmbedder(model, half=True), data, tune, part, score))
    print_bucc(rows, Console())
    if json:
        write_json(json, rows)


@app.command("mteb")
def mteb_(
    model: Model,
    task: Annotated[
        list[str], typer.Option(help="A name that mteb knows, such as Tatoeba or STS22.v2; may be repeated.")
    ],
    out: Annotated[Path, typer.Option(help="The folder for mteb's results. A task that is there is not run again.")],
    languages: Annotated[str, typer.Option(help="Only these, as deu or deu-Latn, separated by commas.")] = "",
) -> None:
    """Run tasks of mteb: bitext mining, STS, classification and others on single texts."""
    from rich.console import Console

    from infoxlm_ds.evaluation.embed import SentenceEmbedder
    from infoxlm_ds.evaluation.mteb_model import evaluate_mteb

    evaluate_mteb(model, SentenceEmbedder(model, half=True), task, _codes(languages), out, Console())


@app.command()
def compare(
    results: Annotated[list[Path], typer.Argument(help="Files of `eval retrieval --json`, one for each model.")],
) -> None:
    """Show several models in one table, on the same pairs."""
    from rich.console import Console

    from infoxlm_ds.evaluation.tables import print_comparison, read_json

    names = [path.absolute().parent.name for path in results]
    if len(set(names)) < len(names):
        names = [str(path) for path in results]
    print_comparison({name: read_json(path) for name, path in zip(names, results, strict=True)}, Console())


def embed(
    model: Annotated[Path, typer.Argument(help="A model folder in Hugging Face format.")],
    text: Annotated[Path | None, typer.Argument(help="A file of lines in UTF-8. Default: standard input.")] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write. Default: standard output.")] = None,
    form: Annotated[
        Literal["npy", "parquet"], typer.Option("--format", help="parquet has the columns text and vector.")
    ] = "npy",
    layer: Annotated[int | None, typer.Option(min=0, help="Plain states of this layer; 0: embeddings.")] = None,
    pooling: Annotated[Pooling | None, typer.Option(help="Default: as the folder's sentence vectors.")] = None,
    device: Device = None,
) -> None:
    """Write the sentence vector of each line of a text. By default, vectors are those of `infoxlm eval retrieval`."""
    from infoxlm_ds.evaluation.vectors import embed_lines

    embed_lines(model, text, out, form, layer=layer, pooling=pooling, device=device)


def mine(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="A.txt B.txt OUT.tsv | ROWS.jsonl OUT.jsonl",
            help="Two files of lines in UTF-8, plain or .xz, and the table to write. With --hard-negatives: rows as "
            "`prep build` reads them, and the file to write.",
        ),
    ],
    *,
    model: Model,
    score: Annotated[Score, typer.Option(help="How a pair's cosine becomes its score.")] = "ratio",
    neighbours: Annotated[
        int | None, typer.Option(min=1, help="Of each text, for the score. Default: 4; csls: 10.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Leave out pairs with a lower score.")] = None,
    search: Annotated[Literal["exact", "ivf"], typer.Option(help="ivf: approximate, by faiss.")] = "exact",
    retrieval: Annotated[
        Literal["max", "intersect"],
        typer.Option(help="max: the best pairs first, each text once; intersect: pairs in which each chose the other."),
    ] = "max",
    hard_negatives: Annotated[
        int | None, typer.Option(min=1, help="Write so many wrong texts for each text of a row, in place of pairs.")
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Their cosine is below this part of the right text's. Default: 0.95."),
    ] = None,
    device: Device = None,
) -> None:
    """Find translations in two texts, or hard negatives for the rows of a corpus. A killed run goes on.

    A line of OUT.tsv is a score, a text of A and a text of B; the best come first. OUT.jsonl has the rows of
    ROWS.jsonl, with wrong texts that are near to them.
    """
    from infoxlm_ds.evaluation.hard_negatives import MARGIN, mine_hard_negatives
    from infoxlm_ds.evaluation.mining import How
    from infoxlm_ds.evaluation.mining import mine as mine_pairs

    how = How(score, neighbours, search, retrieval, threshold)
    if hard_negatives is None:
        if len(paths) != 3:
            raise UserError("give three files: A.txt B.txt OUT.tsv")
        if margin is not None:
            raise UserError("--margin is for --hard-negatives only")
        a, b, out = paths
        mine_pairs(a, b, out, model, how, device)
        return
    if len(paths) != 2:
        raise UserError("--hard-negatives: give two files: ROWS.jsonl OUT.jsonl")
    if how != How():
        raise UserError("--hard-negatives: use only --margin, --model and --device with it")
    rows, out = paths
    mine_hard_negatives(rows, out, model, hard_negatives, MARGIN if margin is None else margin, device)


def finetune(
    task: Annotated[
        Literal["xnli", "pawsx", "mlqa", "xquad", "tydiqa", "ner", "pos", "sentences", "pairs"],
        typer.Argument(help="The task."),
    ],
    model: Model,
    data: Annotated[Path, typer.Option(help="The folder of the task's files, see docs/finetune.md.")],
    out: Annotated[Path, typer.Option(help="The folder for models and results. The same command goes on there.")],
    train_languages: Annotated[str, typer.Option(help="Separated by commas.")] = "en",
    languages: Annotated[str, typer.Option(help="To measure. Default: all that have a test file.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="How often to train, with another seed each time.")] = 1,
    select: Annotated[
        Literal["english", "train", "target"],
        typer.Option(help="Whose dev files choose the best epoch: English, the languages of training, all others."),
    ] = "english",
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Default: 5 for pairs, 3 for answers, 10 for words.")
    ] = None,
    patience: Annotated[int | None, typer.Option(min=1, help="End after so many epochs that are not better.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=1e-9, help="Default: 2e-5, for answers 3e-5.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a batch, without padding. Default: 1024, for answers 6144.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=16, help="Of a sequence. Default: 128, for answers 384.")
    ] = None,
    dropout: Annotated[float, typer.Option(min=0, max=0.9)] = 0.1,
) -> None:
    """Train a model on a task in one language, and measure it in every language."""
    from rich.console import Console

    from infoxlm_ds.evaluation.finetune.run import finetune as run_all
    from infoxlm_ds.evaluation.finetune.settings import Settings
    from infoxlm_ds.evaluation.finetune.tasks import TASKS

    settings = Settings(
        task=task,
        model=model,
        data=data,
        out=out,
        epochs=epochs or TASKS[task].epochs,
        max_tokens=max_tokens or TASKS[task].max_tokens,
        train_languages=_codes(train_languages) or ("en",),
        languages=_codes(languages),
        seeds=seeds,
        select=select,
        patience=patience,
        learning_rate=learning_rate or TASKS[task].learning_rate,
        batch_tokens=batch_tokens or TASKS[task].batch_tokens,
        dropout=dropout,
    )
    run_all(settings, Console())


def _codes(text: str) -> tuple[str, ...]:
    """The languages of an option, in their order."""
    return tuple(dict.fromkeys(code.strip() for code in text.split(",") if code.strip()))


def _layer(text: str) -> int | Literal["all"] | None:
    if text in ("", "all"):
        return "all" if text else None
    if not text.isdecimal():
        raise UserError(f"--layer {text}: expected a number or all")
    return int(text)
