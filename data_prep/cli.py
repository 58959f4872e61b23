"""`infoxlm prep build | merge | verify | stat`."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from infoxlm_ds.config import Place, UserError, place
from infoxlm_ds.data.manifest import Manifest

app = typer.Typer(help="Prepare a corpus.", no_args_is_help=True)
Prepared = Annotated[str, typer.Argument(metavar="CORPUS", help="A prepared corpus: a folder or a URL.")]


@app.command("build")
def build_command(
    description: Annotated[Path, typer.Argument(help="A corpus description in YAML.")],
    out: Annotated[Path, typer.Argument(help="The corpus folder to write.")],
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one for each core.")] = None,
    on: Annotated[Literal["pool", "ray"], typer.Option(help="What runs the tasks.")] = "pool",
    part: Annotated[
        str,
        typer.Option(metavar="I/N", help="Do part I = 0 ... N - 1 of the tasks: others, on a common disk, the rest."),
    ] = "0/1",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only estimate disk and time.")] = False,
) -> None:
    """Tokenise text into packs of 512 rows. Goes on where a build ended early; does nothing if the corpus is there."""
    from rich.console import Console

    from data_prep.build import build
    from data_prep.estimate import print_estimate
    from data_prep.run import How

    how = How(workers or len(os.sched_getaffinity(0)), on == "ray", _part(part))
    if dry_run:
        return print_estimate(description, out, how.workers, Console())
    build(description, out, how)


@app.command("merge")
def merge_command(
    out: Annotated[Path, typer.Argument(help="The corpus folder to write.")],
    corpora: Annotated[list[Path], typer.Argument(metavar="CORPUS", help="Two or more corpora of one tokenizer.")],
) -> None:
    """Join prepared corpora that share a tokenizer. Sources of the same name become one."""
    from data_prep.merge import merge

    if len(corpora) < 2:
        raise UserError(f"{corpora[0]} is one corpus: give two or more after {out}, the folder to write")
    merged = merge(out, corpora)
    print(
        f"{out}: {sum(source.items for source in merged.sources):,} items in {len(merged.sources)} sources; rows that "
        "are in more than one of the corpora stay in it as often"
    )


@app.command("verify")
def verify_command(corpus: Prepared) -> None:
    """Check every byte of a corpus. Exit code 1 if one is wrong."""
    from data_prep.verify import verify

    where = _place(corpus)
    problems = verify(where)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise typer.Exit(1)
    print(f"{where}: every file is as it was written")


@app.command("stat")
def stat_command(
    corpus: Prepared,
    samples: Annotated[str | None, typer.Option(metavar="REASON", help="Show texts left out for a reason.")] = None,
) -> None:
    """Show sources, languages, items and tokens of a corpus, and how much was left out."""
    from rich.console import Console
    from rich.table import Table

    from infoxlm_ds.data.manifest import load_manifest

    where = _place(corpus)
    manifest = load_manifest(where)
    if samples is not None:
        return _show_samples(where, manifest, samples)
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


def _show_samples(corpus: Place, manifest: Manifest, reason: str) -> None:
    from infoxlm_ds.data.store import open_store

    by_reason = {}
    if manifest.samples:
        copied = open_store(corpus).copy(manifest.samples, manifest.sha256)
        by_reason = json.loads(copied.read_text(encoding="utf-8"))
    if reason not in by_reason:
        raise UserError(f"{corpus}: nothing was left out for {reason!r}, only for: {', '.join(by_reason) or 'nothing'}")
    print(f"{manifest.counts[reason]:,} texts were left out for {reason}; some of them:")
    for sample in by_reason[reason]:
        print(f"\n{sample['place']}")
        for language, text in sample["texts"].items():
            print(f"  {language}: {text}" if language else f"  {text}")


def _place(text: str) -> Place:
    try:
        return place(text)
    except ValueError as error:
        raise UserError(f"{text}: {error}") from None


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(f"--part {text}: expected I/N with I from 0 to N - 1, such as 0/8")
    return int(match[1]), int(match[2])
