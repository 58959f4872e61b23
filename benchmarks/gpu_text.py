"""Prepares the text of `make gpu`: the corpus that comes with the project, in blocks of 254 pieces."""

from __future__ import annotations

from benchmarks.gpu_report import Part


def write(part: Part, name: str) -> None:
    with part.section("Text"):
        if not (part.corpus / "manifest.json").is_file():
            from benchmarks.cases import corpus_of  # takes seconds to import

            assert corpus_of("blocks-254") == part.corpus, f"there is no corpus in {part.corpus}"
        part.write(f"{part.corpus}, spread over XLM-R's vocabulary")
