#!/usr/bin/env bash
# The paper's ablation: trains the demo with and without cross-lingual contrast, and prints one table.
set -euo pipefail
cd "$(dirname "$0")/.."
unset OMP_NUM_THREADS # training divides the cores among its ranks
infoxlm demo runs/demo
infoxlm demo runs/ablation corpus=runs/demo/corpus weights.xlco=0
infoxlm eval compare runs/demo/retrieval.json runs/ablation/retrieval.json
