"""`infoxlm checkpoint <verb>`. A verb imports its modules when it runs, so that --help is fast."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="List, verify, consolidate and remove a run's checkpoints.", no_args_is_help=True)
Run = Annotated[Path, typer.Argument(help="A run's folder.")]


@app.command("list")
def list_(run: Run) -> None:
    """List steps, sizes and numbers of ranks, and folders that are not committed checkpoints."""
    from rich.console import Console

    from infoxlm_ds.checkpoint.tools import list_checkpoints

    list_checkpoints(run, Console())


@app.command()
def verify(
    run: Run, step: Annotated[int | None, typer.Option(min=1, help="Only this step. Default: all.")] = None
) -> None:
    """Read every byte and compare it with what was written. Exit code 1 if something differs."""
    from rich.console import Console

    from infoxlm_ds.checkpoint.tools import verify as verify_run

    if not verify_run(run, step, Console()):
        raise typer.Exit(1)


@app.command()
def consolidate(
    run: Run,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    step: Annotated[int | None, typer.Option(min=1, help="Default: the newest.")] = None,
) -> None:
    """Write the fp32 weights, also the key encoder's, as whole tensors in safetensors files."""
    from infoxlm_ds.checkpoint.consolidate import consolidate as consolidate_run

    consolidate_run(run, out, step)


@app.command()
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
