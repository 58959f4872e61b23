"""`infoxlm report`: what it says of runs, and how a browser shows it."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.publish.report import svg
from infoxlm_ds.publish.report.page import MARK, write_report
from infoxlm_ds.publish.report.read import read_run, warnings_of
from infoxlm_ds.publish.report.svg import Series
from tests.corpus import small_recipe
from tests.distributed.ranks import run_ranks
from tests.monitor.test_boards import train_with_sinks

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """What a page holds: its tags with their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.source, self.text = path.read_text(encoding="utf-8"), ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    probe = f"probe={{data: {corpus.parent / 'rows.jsonl'}, every: 2, pairs: 20, languages: [de, hu]}}"
    recipe = small_recipe(corpus, tmp_path_factory.mktemp("report") / "first", probe, "log.tensorboard=false")
    run_ranks(train_with_sinks, 2, recipe)
    return recipe


@pytest.fixture(scope="module")
def written(run: Recipe) -> Path:
    out = run.run.parent / "report.html"
    write_report([run.run], out)
    return out


def test_the_page_says_what_the_run_did(run: Recipe, written: Path) -> None:
    page = Page(written)
    rows = [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "loss" in row][-1]
    for task in ("mmlm", "tlm", "xlco"):
        assert f"{last[f'{task}/loss']:.3f}" in page.text
    for title in ("Loss", "Bound on mutual information", "Held-out retrieval", "Gradient norm", "Key encoder: dist"):
        assert title in page.text
    for title in ("Accuracy@1 in percent, by layer", "Cosine of sentence vectors: en", "before, random weights"):
        assert title in page.text
    assert "layer 2" in page.text and "after step 6" in page.text and "mmlm_tokens: 60" in page.text
    checkpoints = [path.name for path in (run.run / "checkpoints").glob("step-*")]
    assert all(f">{int(name[-8:])}<" in page.source for name in checkpoints)


def test_the_page_loads_nothing_and_everything_has_a_name(written: Path) -> None:
    page = Page(written)
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?:https?:|//)", page.source)
    assert not any(tag in ("script", "img", "iframe", "object") for tag, _ in page.tags)
    pictures = [attributes for tag, attributes in page.tags if tag == "svg" and "aria-hidden" not in attributes]
    known = {attributes.get("id") for _, attributes in page.tags}
    assert pictures and all(a["role"] == "img" and set(str(a["aria-labelledby"]).split()) <= known for a in pictures)
    assert all(attributes["tabindex"] == "0" for tag, attributes in page.tags if tag == "figure")
    regions = [attributes for _, attributes in page.tags if attributes.get("class") == "scroll"]
    assert regions and all(attributes["tabindex"] == "0" for attributes in regions)


def test_several_runs_share_their_axes_and_their_differences_are_listed(run: Recipe, tmp_path: Path) -> None:
    other = run.model_copy(update={"run": tmp_path / "second"})
    other = other.model_copy(update={"optimizer": run.optimizer.model_copy(update={"learning_rate": 0.02})})
    run_ranks(train_with_sinks, 2, other)
    write_report([run.run, other.run], tmp_path / "both.html", with_model=False)
    page = Page(tmp_path / "both.html")
    table = re.search(r"What differs:.*?</table>", page.source, re.S)
    assert table and re.findall(r"<th scope=row>([^<]*)", table[0]) == ["optimizer.learning_rate"]
    figure = re.search(r"<figure[^>]*><figcaption>Loss: XlCo.*?</figure>", page.source, re.S)
    assert figure and figure[0].count("<polyline") == 2 and "first" in figure[0] and "second" in figure[0]


def test_what_a_reader_should_know_first(run: Recipe, tmp_path: Path) -> None:
    shutil.copytree(run.run, tmp_path / "bad")
    with (tmp_path / "bad" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "skipped": "loss not finite: mmlm on rank 0"}\n')
        file.write('{"step": 6, "save_failed": "No space left on device"}\n')
        file.write('{"step": 8, "loss": 1, "queue/filled": 0.5, "data/damaged_draws": 3}\n')
        file.write('{"step": 8, "probe/mean": 0.0, "probe/trigram_mean": 0.4}\nhalf a li')
    found = list(warnings_of(read_run(tmp_path / "bad")))
    for said in ("1 lines of", "1 steps were not applied", "could not be written at step 6", "3 draws of damaged"):
        assert any(said in text for text in found), said
    for said in ("filled to 50%", "below the 0.400 of character trigrams", "The best probe was at step"):
        assert any(said in text for text in found), said
    assert not any("not applied" in text for text in warnings_of(read_run(run.run)))


def test_a_run_without_checkpoint_or_corpus_has_a_report_of_its_figures(run: Recipe, tmp_path: Path) -> None:
    (tmp_path / "young").mkdir()
    shutil.copy(run.run / "metrics.jsonl", tmp_path / "young")
    write_report([tmp_path / "young"], tmp_path / "young.html")
    text = Page(tmp_path / "young.html").text
    assert "There is no checkpoint yet" in text and "Held-out retrieval" in text


@pytest.mark.parametrize("mistake", ["no run", "no figures", "a folder", "another file", "no page"])
def test_mistakes_are_named_and_nothing_is_written_over(run: Recipe, tmp_path: Path, mistake: str) -> None:
    folder, out = run.run, tmp_path / "out.html"
    if mistake == "no run":
        folder = tmp_path
    elif mistake == "no figures":
        folder = tmp_path / "empty"
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("\n")
    elif mistake == "a folder":
        out.mkdir()
    elif mistake == "another file":
        out.write_text("mine")
    else:
        out = tmp_path / "run2"
    said = {
        "no run": "has no metrics.jsonl",
        "no figures": "no line that can be read",
        "a folder": "is there and is no report",
        "another file": "is there and is no report",
        "no page": "ends in .html",
    }
    with pytest.raises(UserError, match=said[mistake]):
        write_report([folder], out, with_model=False)
    assert mistake != "another file" or out.read_text() == "mine"


def test_a_report_may_be_written_again(run: Recipe, tmp_path: Path) -> None:
    for _ in range(2):
        write_report([run.run], tmp_path / "out.html", with_model=False)
    assert MARK in (tmp_path / "out.html").read_text()[:200]


def test_a_line_has_gaps_where_values_are_missing_and_few_points() -> None:
    steps = list(range(3000))
    values = [math.nan if 1000 <= step < 2000 else 2.0 * step for step in steps]
    drawn = svg.lines("t", "u", [Series("a", steps, values)])
    parts = re.findall(r'points="([^"]*)"', drawn)
    assert len(parts) == 2 and sum(len(part.split()) for part in parts) <= svg.POINTS
    last = parts[1].split()[-1].split(",")
    assert float(last[0]) == pytest.approx(svg.WIDTH - svg.RIGHT, abs=2) and float(last[1]) < 40
    assert svg.lines("t", "u", [Series("a", [1], [math.nan])]) == ""


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.5, 0.2), (1e-7, 4e-7), (5.0, 5.0), (0.0, 3e6)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    axis = svg._Axis.around(np.array([low, high]), 100, 0)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 8 and all(axis.low <= tick <= axis.high for tick in ticks)
    assert axis(low) >= axis(high)


def test_text_of_runs_is_never_markup() -> None:
    drawn = svg.lines("<b>", "&", [Series("<script>", [1, 2], [1, 2])]) + svg.table(("<i>",), [("<u>",)])
    assert not re.search(r"<(b|script|i|u)>", drawn)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(written: Path, tmp_path: Path, width: int, scheme: Any) -> None:
    """Nothing is wider than the screen, nothing is loaded, nothing complains, and Tab reaches figures and tables."""
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        asked, said = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.goto(written.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for summary in page.locator("summary").all():
            summary.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ink, paper = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "background"))
        assert (_light(ink) > _light(paper)) == (scheme == "dark")
        reached = set()
        for _ in range(page.locator("figure, .scroll, summary, a").count()):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.tagName + document.activeElement.className"))
        assert {"FIGURE", "DIVscroll", "SUMMARY", "A", "PREscroll"} <= reached
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        browser.close()
    assert asked == [written.as_uri()] and said == []
    assert (tmp_path / "page.png").stat().st_size > 20_000


def _light(colour: str) -> float:
    found = re.search(r"rgb\((\d+), (\d+), (\d+)\)", colour)
    assert found, colour
    return sum(map(int, found.groups()))
