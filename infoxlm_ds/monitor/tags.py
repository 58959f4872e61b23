"""The names under which TensorBoard, Weights & Biases and metrics.csv show the scalars of metrics.jsonl."""

from __future__ import annotations

TASKS = {"mmlm": "MMLM", "tlm": "TLM", "xlco": "XlCo"}
# Groups in the order of their importance.
GROUPS = (
    "loss",
    "bound",
    "retrieval",
    "contrast",
    "momentum",
    "optimizer",
    "data",
    "speed",
    "memory",
    "checkpoint",
)
_GROUP = {"xlco": "contrast", "queue": "contrast", "probe": "retrieval"}
_NAMES = {
    "loss": "loss/total",
    "queue/filled": "contrast/queue_filled",
    "queue/mean_age": "contrast/queue_mean_age",
    "speed/data_wait_share": "data/wait_share",
}
FINAL = ("retrieval/mean", "retrieval/best", *(f"loss/{task}" for task in TASKS))


def tag(name: str) -> str:
    """The tag of a scalar: a group, a slash and a name."""
    group, _, rest = name.partition("/")
    if name in _NAMES:
        return _NAMES[name]
    if group in TASKS and rest in ("loss", "information_bound"):
        return f"{'loss' if rest == 'loss' else 'bound'}/{group}"
    return f"{_GROUP.get(group, group)}/{rest}"


def of_languages(task: str, name: str) -> str:
    """The tag of a task's loss in a language or a pair of languages."""
    return f"loss_{task}/{name}"
