"""`infoxlm prep build | verify | stat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Prepare a corpus.", no_args_is_help=True)
CorpusFolder = Annotated[Path, typer.Argument(help="A prepared corpus.")]


@app.command("build")
def build_command(
    description: Annotated[Path, typer.Argument(help="A corpus description in YAML.")],
    out: Annotated[Path, typer.Argument(help="The corpus folder to write.")],
) -> None:
    """Tokenise text into packs of 512 rows. Does nothing if the corpus exists already."""
    from data_prep.build import build

    build(description, out)


@app.command("verify")
def verify_command(corpus: CorpusFolder) -> None:
    """Check every byte of a corpus. Exit code 1 if one is wrong."""
    from data_prep.verify import verify

    problems = verify(corpus)
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{corpus}: every file is as it was written")


@app.command("stat")
def stat_command(corpus: CorpusFolder) -> None:
    """Show sources, languages, items and tokens of a corpus."""
    from rich.console import Console
    from rich.table import Table

    from infoxlm_ds.data.manifest import load_manifest

    manifest = load_manifest(corpus)
    table = Table("source", "kind", "languages", title=manifest.name)
    for heading in ("items", "tokens", "tokens an item", "packs", "MB"):
        table.add_column(heading, justify="right")
    for source in manifest.sources:
        size = sum(shard.bytes for shard in source.shards) / 1e6
        figures = (
            f"{source.items:,}",
            f"{source.tokens:,}",
            f"{source.tokens / source.items:.1f}",
            str(source.packs),
            f"{size:.1f}",
        )
        table.add_row(source.name, source.kind, " ".join(source.languages), *figures)
    console = Console()
    console.print(table)
    console.print(
        f"vocabulary {manifest.tokenizer.vocab_size:,}; " + ", ".join(f"{k} {v:,}" for k, v in manifest.counts.items())
    )
