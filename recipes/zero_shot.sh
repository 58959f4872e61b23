#!/usr/bin/env bash
# The README's table of zero-shot transfer: the demo's model, the same without XlCo and a random one, fine-tuned on two tasks of the embedded corpus.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d runs/demo/export ] || infoxlm demo runs/demo
[ -d runs/ablation/export ] || infoxlm demo runs/ablation corpus=runs/demo/corpus weights.xlco=0
[ -d runs/random/export ] || infoxlm demo runs/random corpus=runs/demo/corpus optimizer.steps=1 optimizer.warmup=0 optimizer.learning_rate=1e-9
python -m data_prep.recipes.zero_shot runs/zero_shot/data
for model in demo ablation random; do
  common="--model runs/$model/export/encoder --epochs 3 --learning-rate 5e-4 --batch-tokens 2048 --seeds 3"
  infoxlm finetune sentences $common --data runs/zero_shot/data/roles --out runs/zero_shot/roles-$model
  infoxlm finetune pairs $common --data runs/zero_shot/data/matching --out runs/zero_shot/matching-$model --train-languages de --select train
done
