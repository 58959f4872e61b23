"""The two tasks of the embedded corpus: roles follow from keys, and nothing gives a label away but the text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from data_prep.recipes import zero_shot
from infoxlm_ds.shipped import TEXTS


@pytest.mark.parametrize(
    ("key", "role"),
    [
        ("c:hive.config.abort.unknown_entry", "abort"),
        ("c:skoda.config.error.api_error", "error"),
        ("c:zinvolt.exceptions.update_failed.message", "error"),
        ("c:comfort.config.step.user.data_description.password", "help"),
        ("c:swiss.config.step.user.data.time_station", "field"),
        ("c:smhi.entity.sensor.grassfire.state.season_over", "state"),
        ("c:intent_script.services.reload.description", "description"),
        ("c:miele.entity.sensor.program_id.name", "name"),
        ("f:config.ui.panel.config.logs.title", None),
        ("c:homeassistant.common.yes", None),
    ],
)
def test_the_role_of_a_key(key: str, role: str | None) -> None:
    assert zero_shot.role(key) == role


def test_both_tasks_are_written_for_all_languages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["zero_shot", str(tmp_path)])
    assert zero_shot.main() == 0 and "examples" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "roles").iterdir()}
    assert {"train-en.tsv", "dev-en.tsv", "test-en.tsv", "test-de.tsv", "test-zh.tsv"} <= names
    for split in ("train-de", "dev-de", "test-de", "test-ru"):
        lines = (tmp_path / "matching" / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
        counts = Counter(line.split("\t")[2] for line in lines)
        assert min(counts.values()) > 0.4 * len(lines) and len(counts) == 2
    texts = {row[1]["en"] for row in zero_shot.read_rows(TEXTS["home_assistant.train"])}
    tested = (tmp_path / "roles" / "test-en.tsv").read_text(encoding="utf-8").splitlines()
    assert not texts & {line.split("\t")[0] for line in tested}
