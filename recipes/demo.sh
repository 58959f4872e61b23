#!/usr/bin/env bash
# Trains an encoder on the corpus that comes with the project, exports it and measures retrieval. Finished parts are reused.
# Usage: recipes/demo.sh [RUN_FOLDER [key.path=value ...]]
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:-runs/demo}
overrides=("run=$run" "${@:2}")
corpus=runs/demo/corpus
data=data_prep/embedded

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then
  overrides+=(engine=ds_configs/zero1_bf16.json)
  if [ "$gpus" -gt 2 ]; then overrides+=("batch.lanes=$gpus"); fi
else
  unset OMP_NUM_THREADS # `infoxlm train` divides the cores among its ranks
fi

infoxlm prep build $data/corpus.yaml $corpus
infoxlm train recipes/demo.yaml "${overrides[@]}"
[ -d "$run/export" ] || infoxlm export "$run" "$run/export"
[ -f "$run/retrieval.json" ] || infoxlm eval retrieval --model "$run/export" --json "$run/retrieval.json" \
  --languages ru,ko,ja,el,hu,de,zh --data $data/home_assistant.dev.jsonl.xz --data $data/wagtail.dev.jsonl.xz \
  --data $data/jupyterlab.dev.jsonl.xz --data $data/kolibri.dev.jsonl.xz
infoxlm eval compare "$run/retrieval.json"
cat <<END
model, Hugging Face format   $run/export
retrieval table as JSON      $run/retrieval.json
curves                       tensorboard --logdir $run/tensorboard   (figures: $run/metrics.jsonl)
END
