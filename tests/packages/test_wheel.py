"""A wheel carries all that a run needs: it works where no clone is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

from tests.corpus import ROOT

LICENCES = sorted((ROOT / "data_prep" / "embedded" / "licenses").iterdir())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, because setuptools leaves files in the folder, and takes what an older build left."""
    folder = tmp_path_factory.mktemp("wheel")
    not_needed = shutil.ignore_patterns(".*", "runs", "build", "dist", "tests", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "copy", symlinks=True, ignore=not_needed)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", folder, folder / "copy"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_it_has_every_module_recipe_engine_configuration_and_text(wheel: zipfile.ZipFile) -> None:
    modules = [p for package in ("infoxlm_ds", "data_prep") for p in (ROOT / package).rglob("*.py")]
    wanted = {str(path.relative_to(ROOT)) for path in modules}
    wanted |= {f"infoxlm_ds/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    wanted |= {f"infoxlm_ds/ds_configs/{path.name}" for path in (ROOT / "ds_configs").iterdir()}
    wanted |= {f"data_prep/embedded/{path.name}" for path in (ROOT / "data_prep/embedded").iterdir() if path.is_file()}
    assert wanted | {"infoxlm_ds/trouble.md"} <= set(wheel.namelist())
    assert wheel.read("infoxlm_ds/trouble.md") == (ROOT / "docs" / "trouble.md").read_bytes()
    for name in ("infoxlm_ds/recipes/demo.yaml", "infoxlm_ds/ds_configs/zero1_bf16.json"):
        assert wheel.read(name) == (ROOT / name.removeprefix("infoxlm_ds/")).read_bytes()


def test_it_fills_no_name_but_its_own(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"infoxlm_ds", "data_prep"}


def test_it_has_its_licence_and_those_of_the_texts(wheel: zipfile.ZipFile, metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Author"] == "the infoxlm_ds developers"
    files = metadata.get_all("License-File") or []
    assert {"LICENSE", "NOTICE", *(str(path.relative_to(ROOT)) for path in LICENCES)} == set(files)
    inside = wheel.namelist()
    assert all(any(name.endswith(f".dist-info/licenses/{file}") for name in inside) for file in files)
    assert metadata["Project-URL"] is None and metadata["Home-page"] is None


def test_the_notice_names_each_text_and_its_licence() -> None:
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    assert all(f"data_prep/embedded/licenses/{path.name}" in notice for path in LICENCES)
    readme = (ROOT / "data_prep" / "embedded" / "README.md").read_text(encoding="utf-8")
    for package, version in re.findall(r"`([a-z-]+)\*?` ([\d.]+(?:post\d)?)", readme):
        assert re.search(rf"{re.escape(package)}\*? {re.escape(version)}", notice), package


def test_the_licence_is_the_one_that_the_text_of_apache_has() -> None:
    assert (ROOT / "LICENSE").read_text().strip() == LICENCES[0].read_text().strip()


def test_the_citation_says_what_the_package_says(metadata: Message) -> None:
    """The keys that version 1.2.0 of the format needs, and the values that stand in two places."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation.keys() >= {"cff-version", "message", "title", "authors"} and citation["cff-version"] == "1.2.0"
    assert citation["authors"] == [{"name": metadata["Author"]}]
    assert (citation["version"], citation["license"]) == (metadata["Version"], metadata["License-Expression"])
    for reference in citation["references"]:
        assert reference.keys() >= {"type", "title", "authors"}


def test_it_runs_where_no_clone_is(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    lines = [("the lamp is on", "das Licht ist an"), ("open the door", "öffne die Tür")]
    for side, code in enumerate(("en", "de")):
        text = "".join(f"{lines[i % 2][side]} {i}\n" for i in range(120))
        (tmp_path / "elsewhere" / code).write_text(text, encoding="utf-8")

    def run(*arguments: str) -> str:
        script = "import sys, infoxlm_ds.cli as cli; print(cli.__file__); cli.main()"
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
        command = [sys.executable, "-c", script, *arguments]
        where = tmp_path / "elsewhere"
        done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(str(tmp_path / "site"))
        return done.stdout

    assert "infoxlm-ds 0.1.0" in run("--version")
    run("init", "mine", "en", "de", "--languages", "en,de")
    assert "engine: zero1_bf16" in run("recipe", "base")
    for recipe in ("mine/recipe.yaml", "demo"):
        assert "ZeRO" in run("plan", recipe, "--gpus", "1", "--vocabulary", "1000", "engine=zero1_bf16")
