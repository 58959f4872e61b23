"""Fine-tuning and evaluation of an encoder on tasks with labels: sentence pairs, labels of words, answers in a text."""
