#!/usr/bin/env bash
# Trains on all translations of Home Assistant, exports the encoder and measures retrieval. Finished parts are reused.
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/evening
data=data_prep/embedded
wheel=homeassistant-2026.11.0-py3-none-any.whl

mkdir -p $run
# --ignore-requires-python: the wheel is read, not installed
[ -f $run/$wheel ] || pip download --quiet --no-deps --ignore-requires-python --dest $run homeassistant==2026.11.0
[ -f $run/rows.jsonl ] || python -m data_prep.recipes.home_assistant $run/$wheel $run/rows.jsonl
infoxlm prep build data_prep/recipes/evening.yaml $run/corpus
unset OMP_NUM_THREADS # `infoxlm train` divides the cores among its ranks
infoxlm train recipes/evening.yaml
[ -d $run/export ] || infoxlm export $run $run/export
infoxlm eval retrieval --model $run/export --json $run/retrieval.json --languages ru,ko,ja,el,hu,de,zh \
  --data $data/home_assistant.dev.jsonl.xz --data $data/wagtail.dev.jsonl.xz \
  --data $data/jupyterlab.dev.jsonl.xz --data $data/kolibri.dev.jsonl.xz
