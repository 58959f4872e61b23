"""`infoxlm <verb>`: the command line. A verb imports its modules when it runs, so that --help is fast."""

import errno
import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from data_prep.cli import app as prep
from data_prep.cli import build_command
from infoxlm_ds import shipped
from infoxlm_ds.config import Pooling, UserError, load_recipe
from infoxlm_ds.trouble import complain

app = typer.Typer(
    help="Pre-training of cross-lingual encoders after InfoXLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
evaluation = typer.Typer(help="Measure a model.", no_args_is_help=True)
app.add_typer(prep, name="prep", help="Turn text into a corpus of packs of token ids.")
app.add_typer(evaluation, name="eval")
checkpoint = typer.Typer(help="List, verify, consolidate and remove a run's checkpoints.", no_args_is_help=True)
app.add_typer(checkpoint, name="checkpoint")
Hostfile = Annotated[Path | None, typer.Option(help="Lines of HOST slots=N, see hostfile.example.")]
Run = Annotated[Path, typer.Argument(help="A run's folder.")]
RecipeFile = Annotated[Path, typer.Argument(help="A recipe in YAML, or the name of one that comes with the package.")]
Score = Literal["cosine", "ratio", "distance", "csls"]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Change the recipe.")]


def _show_versions(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        print(f"Python {sys.version.split()[0]}")
        for name in ("infoxlm-ds", "torch", "deepspeed", "transformers"):
            try:
                print(f"{name} {version(name)}")
            except PackageNotFoundError:
                print(f"{name} not installed")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_versions, help="Show versions and exit.")
    ] = False,
) -> None:
    """Pre-training of cross-lingual encoders after InfoXLM."""


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="The folder for everything that the demo writes.")],
    overrides: Overrides = None,
) -> None:
    """Train on the text that comes with the package, export and evaluate. Goes on where it ended, reuses the rest."""
    from infoxlm_ds.demo import EVALUATED, LANGUAGES, places, write_recipe

    recipe_path = write_recipe(folder)
    recipe = load_recipe(recipe_path, overrides)
    if not isinstance(recipe.corpus, Path):
        raise UserError(f"corpus {recipe.corpus}: the demo writes its corpus: give a folder")
    exported, table = recipe.run / "export", recipe.run / "retrieval.json"
    build_command(shipped.EMBEDDED / "corpus.yaml", recipe.corpus)
    from infoxlm_ds.cluster.launch import launch

    if code := launch(recipe_path, overrides or []):
        raise typer.Exit(code)
    if not exported.is_dir():
        export(recipe.run, exported)
    if not table.is_file():
        retrieval(exported, EVALUATED, languages=LANGUAGES, json=table)
    compare([table])
    report([recipe.run, recipe.run / "report.html"])
    print(places(recipe.run))


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="The folder to write into.")],
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE",
            help="Aligned files, one for each language: line i is the same sentence. Or one .tsv, .jsonl, .tmx or OPUS "
            ".zip with all languages.",
        ),
    ],
    languages: Annotated[
        str, typer.Option(help="Of the files or columns, in their order, separated by commas: en,sw.")
    ] = "",
    from_: Annotated[
        str | None, typer.Option("--from", help="Start from this model: a Hugging Face folder or a name on its hub.")
    ] = None,
) -> None:
    """Write a recipe and a corpus description for your own translations, ready to run."""
    import torch

    from data_prep import starter

    base = None
    if from_ is not None:
        from infoxlm_ds.model.families import positions_of
        from infoxlm_ds.model.pretrained import init_config

        config = init_config(from_)
        base = starter.Base(from_, config.num_hidden_layers, positions_of(config))
    codes = [code.strip() for code in languages.split(",") if code.strip()]
    counted = starter.init(folder, files, codes, base, torch.cuda.device_count())
    print(starter.next_commands(folder, counted))


@app.command("recipe")
def show_recipe(
    name: Annotated[
        str | None, typer.Argument(help="Of a recipe that comes with the package. Default: list them.")
    ] = None,
) -> None:
    """Print a recipe that comes with the package, to be changed: infoxlm recipe base > my.yaml."""
    if name is None:
        print("\n".join(shipped.RECIPES))
    elif name in shipped.RECIPES:
        print(shipped.RECIPES[name].read_text(encoding="utf-8"), end="")
    else:
        raise UserError(f"{name}: no such recipe: choose one of {', '.join(shipped.RECIPES)}")


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    *,
    hostfile: Hostfile = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print what would be done, and start nothing.")
    ] = False,
) -> None:
    """Train on every GPU of this machine (without a GPU, on CPU ranks), or on the hosts of a hostfile."""
    print(f"reading {recipe} ...", flush=True)  # imports take seconds
    from infoxlm_ds.cluster.launch import launch

    raise typer.Exit(launch(recipe, overrides or [], hostfile, dry_run))


@app.command()
def watch(
    run: Run,
    once: Annotated[bool, typer.Option("--once", help="Show the table once and end, as without a terminal.")] = False,
) -> None:
    """Show a running run in a live table, until it ends or ^C. Reads its folder only, so it works over ssh."""
    from rich.console import Console

    from infoxlm_ds.monitor.watch import watch as watch_run

    watch_run(run, Console(), once)


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe in YAML.")] = None,
    overrides: Overrides = None,
    *,
    hostfile: Hostfile = None,
    json: Annotated[Path | None, typer.Option(help="Also write the findings here.")] = None,
) -> None:
    """Check hosts, environment, network, disks, corpus and memory before a run. Exit code 1 if a check fails."""
    from rich.console import Console

    from infoxlm_ds.cluster.doctor.examine import examine
    from infoxlm_ds.cluster.doctor.findings import told, write_json

    findings = told(examine(hostfile, recipe, overrides or []), Console())
    if json:
        write_json(findings, json)
    if any(finding.level == "failure" for finding in findings):
        raise typer.Exit(1)


@app.command("trouble")
def show_trouble(
    symptom: Annotated[
        list[str] | None, typer.Argument(help="Words of a symptom, or a message of the program. Default: list all.")
    ] = None,
) -> None:
    """Say what a symptom means, and what to do about it."""
    from rich.console import Console
    from rich.markdown import Markdown

    from infoxlm_ds.trouble import entries, look_up

    if not symptom:
        print("\n".join(entry.title for entry in entries()))
        return
    words = " ".join(symptom)
    if not (found := look_up(words)):
        raise UserError(f"{words}: no such symptom: `infoxlm trouble` lists them")
    console = Console()
    for entry in found:
        console.print(Markdown(entry.text) if console.is_terminal else entry.text, markup=False, soft_wrap=True)


@prep.command()
def mix(
    recipe: RecipeFile,
    overrides: Overrides = None,
) -> None:
    """Show what a run will read of each source and language, and how often."""
    from rich.console import Console

    from infoxlm_ds.planner.mixture import print_mixture

    print_mixture(recipe, overrides or [], Console())


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    *,
    gpus: Annotated[int, typer.Option(min=1, help="Number of ranks; it must divide batch.lanes.")],
    gpu_memory: Annotated[
        float | None, typer.Option(min=0.001, help="GiB of one GPU: shows whether the run fits, and on how few GPUs.")
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(min=1, help="Tokens of text to train on: shows steps and days.")
    ] = None,
    vocabulary: Annotated[
        int | None, typer.Option(min=1, help="Pieces. Default: the corpus' vocabulary, else XLM-R's.")
    ] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="Measured tokens per second of one GPU.")
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(min=0.001, max=1, help="Assumed in place of --tokens-per-second.")
    ] = None,
    gpu_flops: Annotated[
        float, typer.Option(min=1, help="Peak operations per second, for --mfu; default: H100, bf16, dense.")
    ] = 989e12,
    json: Annotated[Path | None, typer.Option(help="Also write everything here.")] = None,
) -> None:
    """Estimate a recipe's memory for each ZeRO stage, its operations, bytes sent and time, without running it."""
    from rich.console import Console

    from infoxlm_ds.planner.report import Wishes, print_plan, read_setting, write_json

    wishes = Wishes(gpus, gpu_memory, tokens, vocabulary, tokens_per_second, gpu_flops, mfu)
    setting = read_setting(recipe, overrides or [], wishes)
    print_plan(setting, wishes, Console())
    if json:
        write_json(setting, wishes, json)


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
    forms: Annotated[
        list[str] | None,
        typer.Option("--as", help="hf, sentence-transformers or onnx; may be repeated. Default: the first two."),
    ] = None,
    step: Annotated[int | None, typer.Option(min=1, help="This checkpoint. Default: the newest.")] = None,
    best: Annotated[bool, typer.Option("--best", help="The checkpoint with the highest probe accuracy.")] = False,
    layer: Annotated[
        int | None,
        typer.Option(min=0, help="Sentence vectors are the plain states of this layer. Default: as the run trained."),
    ] = None,
) -> None:
    """Write a run's model for transformers, sentence-transformers and ONNX, and check what was written."""
    from infoxlm_ds.publish.export import DEFAULT
    from infoxlm_ds.publish.export import export as export_run

    export_run(run, out, forms or DEFAULT, step=step, best=best, layer=layer)


@app.command()
def report(
    paths: Annotated[
        list[Path], typer.Argument(metavar="RUN... OUT.html", help="Folders of runs, and the page to write.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="Parallel text to look at the models with, JSON lines. Default: that of the run's probe."),
    ] = None,
    pivot: Annotated[str, typer.Option(help="The pivot language of --data.")] = "en",
    with_model: Annotated[
        bool, typer.Option("--model/--no-model", help="Whether to look at the models: takes some seconds a run.")
    ] = True,
) -> None:
    """Write one HTML page about runs: curves, retrieval by layer and language, languages, settings, warnings."""
    from infoxlm_ds.publish.report.page import write_report

    *runs, out = paths
    if not runs:
        raise UserError("give the folder of a run, or several, and then the page to write: RUN... OUT.html")
    write_report(runs, out, data, pivot, with_model)
    print(out)


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="A folder that `infoxlm export` wrote.")],
    name: Annotated[str, typer.Argument(help="The repository, such as my-team/my-model.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    endpoint: Annotated[str | None, typer.Option(help="Another hub. Default: HF_ENDPOINT or the public one.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Upload an export to the hub of Hugging Face, with your token, after asking you. Exit code 1 if you say no."""
    from infoxlm_ds.publish.upload import publish as upload

    address = upload(folder, name, private=private, endpoint=endpoint, yes=yes)
    if address is None:
        print("nothing was uploaded")
        raise typer.Exit(1)
    print(address)


@app.command()
def embed(
    model: Annotated[Path, typer.Argument(help="A model folder in Hugging Face format.")],
    text: Annotated[Path | None, typer.Argument(help="A file of lines in UTF-8. Default: standard input.")] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write. Default: standard output.")] = None,
    form: Annotated[
        Literal["npy", "parquet"], typer.Option("--format", help="parquet has the columns text and vector.")
    ] = "npy",
    layer: Annotated[int | None, typer.Option(min=0, help="Plain states of this layer; 0: embeddings.")] = None,
    pooling: Annotated[Pooling | None, typer.Option(help="Default: as the folder's sentence vectors.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: a GPU if there is one.")] = None,
) -> None:
    """Write the sentence vector of each line of a text. By default, vectors are those of `infoxlm eval retrieval`."""
    from infoxlm_ds.evaluation.vectors import embed_lines

    embed_lines(model, text, out, form, layer=layer, pooling=pooling, device=device)


@app.command()
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
    model: Annotated[Path, typer.Option(help="A model folder in Hugging Face format.")],
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
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: a GPU if there is one.")] = None,
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


@app.command()
def finetune(
    task: Annotated[
        Literal["xnli", "pawsx", "mlqa", "xquad", "tydiqa", "ner", "pos", "sentences", "pairs"],
        typer.Argument(help="The task."),
    ],
    model: Annotated[Path, typer.Option(help="A model folder in Hugging Face format.")],
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
        *(task, model, data, out),
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


@checkpoint.command("list")
def list_(run: Run) -> None:
    """List steps, sizes and numbers of ranks, and folders that are not committed checkpoints."""
    from rich.console import Console

    from infoxlm_ds.checkpoint.tools import list_checkpoints

    list_checkpoints(run, Console())


@checkpoint.command()
def verify(
    run: Run, step: Annotated[int | None, typer.Option(min=1, help="Only this step. Default: all.")] = None
) -> None:
    """Read every byte and compare it with what was written. Exit code 1 if something differs."""
    from rich.console import Console

    from infoxlm_ds.checkpoint.tools import verify as verify_run

    if not verify_run(run, step, Console()):
        raise typer.Exit(1)


@checkpoint.command()
def consolidate(
    run: Run,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    step: Annotated[int | None, typer.Option(min=1, help="Default: the newest.")] = None,
) -> None:
    """Write the fp32 weights, also the key encoder's, as whole tensors in safetensors files."""
    from infoxlm_ds.checkpoint.consolidate import consolidate as consolidate_run

    consolidate_run(run, out, step)


@checkpoint.command()
def prune(
    run: Run,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Keep so many of the newest. Default: checkpoint.keep.")
    ] = None,
    keep_every: Annotated[
        int | None, typer.Option(min=1, help="Also keep multiples of this step. Default: checkpoint.keep_every.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be removed.")] = False,
) -> None:
    """Remove older checkpoints, and damaged ones that were renamed."""
    from rich.console import Console

    from infoxlm_ds.checkpoint.tools import prune as prune_run

    prune_run(run, keep, keep_every, dry_run, Console())


@evaluation.command()
def retrieval(
    model: Annotated[Path, typer.Option(help="A model folder in Hugging Face format.")],
    data: Annotated[
        list[Path],
        typer.Option(
            help="Parallel text: JSON lines, TSV, PREFIX.de-en.de, or a folder of such pairs; may be repeated."
        ),
    ],
    pivot: Annotated[str, typer.Option(help="The language that is paired with all others.")] = "en",
    layer: Annotated[
        str, typer.Option(help="Number (0: embeddings) or all. Default: the universal layer, else the last.")
    ] = "",
    pooling: Annotated[
        Literal["mean", "cls", "both"] | None, typer.Option(help="Default: from the model's config, else mean.")
    ] = None,
    score: Annotated[Score, typer.Option(help="Compare cosines, or cosines with those of near neighbours.")] = "cosine",
    languages: Annotated[
        str, typer.Option(help="Only these, separated by commas; zh includes every zh_*. Default: all.")
    ] = "",
    min_pairs: Annotated[int, typer.Option(min=1, help="Leave out languages with fewer pairs.")] = 50,
    beside: Annotated[
        list[str] | None,
        typer.Option(help="Another model on the same pairs: any that sentence-transformers loads; may be repeated."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the rows here.")] = None,
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


@evaluation.command()
def layers(
    model: Annotated[Path, typer.Option(help="A model folder in Hugging Face format.")],
    data: Annotated[list[Path], typer.Option(help="Parallel text, as for `eval retrieval`; may be repeated.")],
    pivot: Annotated[str, typer.Option(help="The language that is paired with all others.")] = "en",
    pooling: Annotated[
        Literal["mean", "cls", "both"] | None, typer.Option(help="Default: from the model's config, else mean.")
    ] = None,
    languages: Annotated[str, typer.Option(help="Only these, separated by commas. Default: all.")] = "",
    min_pairs: Annotated[int, typer.Option(min=1, help="Leave out languages with fewer pairs.")] = 50,
    json: Annotated[Path | None, typer.Option(help="Also write the rows here.")] = None,
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


@evaluation.command()
def alignment(
    model: Annotated[Path, typer.Option(help="A model folder in Hugging Face format.")],
    text: Annotated[tuple[Path, Path], typer.Option(help="Two files of sentences, words separated by spaces.")],
    gold: Annotated[Path, typer.Option(help="Lines such as 0-0 1p2, or SENTENCE WORD WORD [S|P].")],
    first: Annotated[int, typer.Option(min=0, max=1, help="The number of the first word in the gold file.")] = 0,
    layer: Annotated[str, typer.Option(help="Number (0: embeddings) or all.")] = "all",
    json: Annotated[Path | None, typer.Option(help="Also write the rows here.")] = None,
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


@evaluation.command()
def bucc(
    model: Annotated[Path, typer.Option(help="A model folder in Hugging Face format.")],
    data: Annotated[Path, typer.Option(help="The folder of BUCC's files: de-en.training.de, .en, .gold and so on.")],
    tune: Annotated[str, typer.Option(help="The part that the threshold comes from.")] = "training",
    part: Annotated[str, typer.Option(help="The part that is measured.")] = "test",
    score: Annotated[Score, typer.Option(help="As for `infoxlm mine`.")] = "ratio",
    json: Annotated[Path | None, typer.Option(help="Also write the rows here.")] = None,
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


@evaluation.command("mteb")
def mteb_(
    model: Annotated[Path, typer.Option(help="A model folder in Hugging Face format.")],
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


@evaluation.command()
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


def main() -> None:
    """The console script. Exit codes: 0 done, 1 failed, 2 the user's mistake, 75 stopped on request, 130 ^C."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except UserError as error:
        _end(str(error), 2)
    except typer.Abort:
        sys.exit(130)
    except OSError as error:  # each command says what it does with files; here is what the system refused
        place = f"{error.filename}: " if error.filename is not None else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        _end(f"{place}{error.strerror or error}{': free some space and run the command again' * full}", 1)
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # typer does not publish the types of its errors
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        if hasattr(error, "format_message"):  # of a command line
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "infoxlm"
            _end(f"{error.format_message().rstrip('.')}: see `{command} --help`", 2)
        if type(error).__name__ != "SafetensorError":  # its own type for what the system refuses
            raise
        _end(str(error), 1)


def _end(message: str, code: int) -> NoReturn:
    complain(message)
    sys.exit(code)


def _codes(text: str) -> tuple[str, ...]:
    """The languages of an option, in their order."""
    return tuple(dict.fromkeys(code.strip() for code in text.split(",") if code.strip()))


def _layer(text: str) -> int | Literal["all"] | None:
    if text in ("", "all"):
        return "all" if text else None
    if not text.isdecimal():
        raise UserError(f"--layer {text}: expected a number or all")
    return int(text)
