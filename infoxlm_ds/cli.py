"""`infoxlm <verb>`: the command line. A verb imports its modules when it runs, so that --help is fast."""

import errno
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from data_prep.cli import app as prep
from data_prep.cli import build_command
from infoxlm_ds import shipped
from infoxlm_ds.checkpoint.cli import Run
from infoxlm_ds.checkpoint.cli import app as checkpoint
from infoxlm_ds.config import UserError
from infoxlm_ds.evaluation.cli import app as evaluation
from infoxlm_ds.evaluation.cli import compare, embed, finetune, mine, retrieval
from infoxlm_ds.reading import load_recipe
from infoxlm_ds.trouble import complain

app = typer.Typer(
    help="Pre-training of cross-lingual encoders after InfoXLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(prep, name="prep", help="Turn text into a corpus of packs of token ids.")
app.add_typer(evaluation, name="eval")
app.add_typer(checkpoint, name="checkpoint")
Hostfile = Annotated[Path | None, typer.Option(help="Lines of HOST slots=N, see hostfile.example.")]
RecipeFile = Annotated[Path, typer.Argument(help="A recipe in YAML, or the name of one that comes with the package.")]
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
    from infoxlm_ds.cluster.doctor.findings import print_findings, write_json

    findings = print_findings(examine(hostfile, recipe, overrides or []), Console())
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


app.command()(embed)
app.command()(mine)
app.command()(finetune)


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
