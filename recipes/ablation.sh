#!/usr/bin/env bash
# The paper's ablation: trains the demo with and without cross-lingual contrast, and prints one table.
set -euo pipefail
cd "$(dirname "$0")/.."
bash recipes/demo.sh
bash recipes/demo.sh runs/ablation weights.xlco=0
infoxlm eval compare runs/demo/retrieval.json runs/ablation/retrieval.json
