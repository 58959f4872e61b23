"""Pre-training of cross-lingual encoders after InfoXLM (arXiv 2007.07834) on DeepSpeed."""
