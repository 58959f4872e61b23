"""The recipe of `infoxlm demo`, and where its results are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from infoxlm_ds.atomic import write_file
from infoxlm_ds.shipped import RECIPES, TEXTS

EVALUATED = [TEXTS[name] for name in ("home_assistant.dev", "wagtail.dev", "jupyterlab.dev", "kolibri.dev")]
LANGUAGES = "ru,ko,ja,el,hu,de,zh"  # zh stands for every zh_*


def write_recipe(folder: Path) -> Path:
    """Write `demo.yaml` into `folder`: the demo's recipe with its run and corpus there. With GPUs it trains in bf16 on
    all of them. Returns its path."""
    gpus = torch.cuda.device_count()
    values = {"run": json.dumps(str(folder.absolute())), "corpus": json.dumps(str(folder.absolute() / "corpus"))}
    if gpus:
        values["engine"] = "zero1_bf16"
    if gpus > 2:
        values["  lanes"] = str(gpus)
    text = RECIPES["demo"].read_text(encoding="utf-8")
    for key, value in values.items():
        before, _, after = re.split(rf"^({key}: .*)$", text, flags=re.MULTILINE)
        text = f"{before}{key}: {value}{after}"
    folder.mkdir(parents=True, exist_ok=True)
    note = "# Written by `infoxlm demo`, at each call: copy it before you change it.\n"
    write_file(folder / "demo.yaml", note + text)
    return folder / "demo.yaml"


def places(run: Path) -> str:
    """What a user looks at next."""
    return f"""\
model, Hugging Face format   {run / "export"}
retrieval table as JSON      {run / "retrieval.json"}
report, for a browser        {run / "report.html"}
curves                       tensorboard --logdir {run / "tensorboard"}   (figures: {run / "metrics.jsonl"})"""
