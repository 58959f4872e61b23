"""Watchdogs: what goes wrong in a run although it goes on. Each is said once in a run, with a remedy.

They know only the recipe and the lines of metrics.jsonl. So a run that goes on reads its own lines again, and then
knows what it knew before.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from math import inf, log1p
from statistics import fmean, median
from typing import NamedTuple

from infoxlm_ds.config import ConstantWithRefresh, Recipe
from infoxlm_ds.data.packs import ROWS
from infoxlm_ds.model.momentum import momentum_at
from infoxlm_ds.monitor.history import Row

KEPT = 200  # lines of the log that are looked back on
RECENT = 5  # lines over which a figure is averaged
FEW_PACKS = 20  # of a language's texts: items are drawn pack by pack, so a language comes in bursts
OLD = 100  # steps after which a key of an encoder that is trained itself is taken to be stale
WAITS, SAVES, APART = 0.05, 0.05, 0.25  # shares of the time


class Warned(NamedTuple):
    name: str
    text: str


class Seen:
    """What the lines told so far. `rows`: the last ones of the log; `missed`: for each task and language, how many
    texts were expected of it since it was last read."""

    def __init__(
        self,
        recipe: Recipe,
        shares: Mapping[str, Mapping[str, float]] | None = None,
        sides: Mapping[str, Sequence[str]] | None = None,
        memory: float = inf,
    ) -> None:
        """`shares`: of each task's texts, by language; `sides`: the languages of each pair, by its name; `memory`: GiB
        that rank 0 may take."""
        self.recipe, self.memory = recipe, memory
        self._shares, self._sides = shares or {}, sides or {}
        self.rows: deque[Row] = deque(maxlen=KEPT)
        self.missed: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.saves, self.saving, self.seconds = 0, 0.0, 0.0

    def add(self, row: Row) -> bool:
        """Take in a line. Returns whether it is one of the log."""
        if "checkpoint/blocked" in row:
            self.saves, self.saving = self.saves + 1, self.saving + row["checkpoint/blocked"]
        if "seconds" not in row:
            return False
        self.seconds += row["seconds"]
        self.rows.append({name: value for name, value in row.items() if not isinstance(value, dict)})
        for task, items in row.get("languages", {}).items():
            self._count(task, items)
        return True

    def _count(self, task: str, items: Mapping[str, int]) -> None:
        read: Counter[str] = Counter()
        for name, number in items.items():
            for language in self._sides.get(name, [name]):
                read[language] += number
        for language, share in self._shares.get(task, {}).items():
            self.missed[task, language] += share * read.total()
            if read[language]:
                self.missed[task, language] = 0

    @property
    def now(self) -> Row:
        return self.rows[-1]

    @property
    def warm(self) -> bool:
        """Whether the learning rate has passed its warm-up, and RECENT lines have followed."""
        return len(self.rows) >= RECENT and self.rows[-RECENT]["step"] >= self.recipe.optimizer.warmup

    def mean(self, name: str) -> float | None:
        """Of the last RECENT lines; None if one of them does not have the figure."""
        values = [row[name] for row in list(self.rows)[-RECENT:] if name in row]
        return fmean(values) if len(values) == RECENT else None


class Watchdog(NamedTuple):
    """`found` gives what is wrong, as it was measured, or None."""

    name: str
    found: Callable[[Seen], str | None]
    remedy: str


def _collapse(seen: Seen) -> str | None:
    rank = seen.now.get("xlco/effective_rank", inf)
    if rank >= 2 or not seen.warm:
        return None
    return f"sentence vectors have collapsed: they use {rank:.1f} dimensions (effective rank)"


def _chance(seen: Seen) -> str | None:
    """By the bound, because vectors that are all equal count as hits."""
    loss, negatives = seen.mean("xlco/loss"), seen.mean("xlco/negatives")
    if loss is None or not negatives or not seen.warm or seen.mean("xlco/positives"):
        return None
    known = log1p(negatives) - loss
    if known >= 0.05:
        return None
    return f"the contrast is at chance: its loss of {loss:.2f} is that of a blind choice among {1 + negatives:,.0f}"


def _saturated(seen: Seen) -> str | None:
    share = seen.mean("xlco/gradient_share")
    if share is None or share >= 0.02 or not seen.warm:
        return None
    return f"the contrast is solved: {share:.1%} of its gradient is left, accuracy {seen.now['xlco/accuracy']:.1%}"


def _stale(seen: Seen) -> str | None:
    age, contrast = seen.now.get("queue/mean_age", 0.0), seen.recipe.contrast
    limit: float = OLD
    if contrast.keys == "momentum":
        schedule = contrast.momentum
        moved = 1 - momentum_at(schedule, seen.now["step"])
        limit = schedule.every if isinstance(schedule, ConstantWithRefresh) else 1 / moved if moved else inf
    if age <= limit:
        return None
    return (
        f"keys of the queue are stale: {age:,.0f} steps old on average, and their encoder stays alike for {limit:,.0f}"
    )


def _frozen(seen: Seen) -> str | None:
    changed = [row["momentum/changed_share"] for row in seen.rows if "momentum/changed_share" in row][-2:]
    if len(changed) < 2 or any(changed) or isinstance(seen.recipe.contrast.momentum, ConstantWithRefresh):
        return None
    return "the key encoder stands still: no weight changed in two logged steps"


def _temperature(seen: Seen) -> str | None:
    bounds, value = seen.recipe.contrast.learn_temperature_within, seen.now.get("xlco/temperature")
    if bounds is None or value is None or not seen.warm or bounds[0] * 1.01 < value < bounds[1] * 0.99:
        return None
    return f"the learned temperature is at a bound: {value:.4g} within {bounds[0]:g} and {bounds[1]:g}"


def _language(seen: Seen) -> str | None:
    task, language = max(seen.missed, key=lambda key: seen.missed[key], default=("", ""))
    expected = seen.missed.get((task, language), 0)
    if expected <= FEW_PACKS * ROWS:
        return None
    return f"{task} reads nothing in {language}: {expected:,.0f} texts were expected since it last did"


def _spike(seen: Seen) -> str | None:
    for task in ("mmlm", "tlm", "xlco"):
        rows = [row for row in list(seen.rows)[-21:] if f"{task}/loss" in row]
        if task == "xlco":  # the loss rises when the queue is full and its keys come in
            rows = [row for row in rows if row.get("xlco/negatives", 0) * 1.5 > seen.now.get("xlco/negatives", 0)]
        *before, now = [row[f"{task}/loss"] for row in rows] or [0.0]
        if len(before) < 2 * RECENT:
            continue
        usual = median(before)
        if now - usual > max(0.5, 10 * median(abs(loss - usual) for loss in before)):
            return f"the loss of {task} jumped to {now:.2f}: it was {usual:.2f} in the lines before"
    return None


def _waiting(seen: Seen) -> str | None:
    share = seen.mean("speed/data_wait_share")
    if share is None or share <= WAITS or len(seen.rows) <= RECENT:  # the first line has the loader's start
        return None
    return f"training waits for data {share:.0%} of the time"


def _apart(seen: Seen) -> str | None:
    share = seen.mean("speed/slowest_rank")
    if share is None or share <= APART:
        return None
    return f"ranks are not equally fast: forward passes of rank {seen.now['slowest']} take {share:.0%} above the mean"


def _growing(seen: Seen) -> str | None:
    """Only if it would not end well. The peak of a healthy run rises too, in ever smaller steps."""
    rows = [row for row in seen.rows if "memory/peak" in row]
    if len(rows) < KEPT // 4:
        return None
    then, late, now = (rows[len(rows) * quarter // 4 - (quarter == 4)] for quarter in (2, 3, 4))
    peak, steps = now["memory/peak"], now["step"] - then["step"]
    growth = peak - then["memory/peak"]
    coming = growth * (seen.recipe.optimizer.steps - now["step"]) / max(steps, 1)
    if growth <= 0.05 * peak or peak <= late["memory/peak"] or peak + coming <= seen.memory:
        return None
    return f"memory grows: the peak is {peak:.1f} GiB, {growth:.1f} more than {steps:,} steps ago, of {seen.memory:.0f}"


def _dear(seen: Seen) -> str | None:
    if seen.saves < 2 or seen.saving <= SAVES * seen.seconds:
        return None
    return f"checkpoints take {seen.saving / seen.seconds:.0%} of the time, {seen.saving / seen.saves:.1f} seconds each"


WATCHDOGS = (
    Watchdog("collapse", _collapse, "lower optimizer.learning_rate or raise contrast.temperature, and start again"),
    Watchdog(
        "chance",
        _chance,
        "look at the pairs with `infoxlm prep stat --samples`, lower optimizer.learning_rate, or lower "
        "model.universal_layer in a small model",
    ),
    Watchdog(
        "saturated",
        _saturated,
        "give it more negatives (batch.xlco_pairs and, with a queue, contrast.queue.size), hard ones or harder pairs",
    ),
    Watchdog(
        "stale_queue", _stale, "set a smaller contrast.queue.size, more batch.xlco_pairs or a momentum nearer to 1"
    ),
    Watchdog("frozen_keys", _frozen, "set contrast.momentum below 1"),
    Watchdog("temperature", _temperature, "widen contrast.learn_temperature_within, or leave it out"),
    Watchdog("language", _language, "check its source with `infoxlm prep stat` and its share with `infoxlm prep mix`"),
    Watchdog("spike", _spike, "if it does not come down, go back to a checkpoint with a lower optimizer.learning_rate"),
    Watchdog("data_wait", _waiting, "use a faster disk or INFOXLM_CACHE, fewer ranks on a host, or larger lanes"),
    Watchdog(
        "slow_rank", _apart, "look for other programs, heat or a slow disk on its host; `infoxlm doctor` compares hosts"
    ),
    Watchdog(
        "memory", _growing, "stop with ^C before it is full and run the same command again, which begins with less"
    ),
    Watchdog("checkpoints", _dear, "raise checkpoint.every, or set checkpoint.asynchronous=true"),
)


class Watchdogs:
    """`held`: the number of lines at which each watchdog that was said found its fault; `said`: where and what."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self.held: Counter[str] = Counter()
        self.said: dict[str, str] = {}

    def recall(self, row: Row) -> None:
        """Take in a line of an earlier start of the run."""
        self._seen.add(row)
        if "warning" in row:
            self._note(row["step"], Warned(str(row["warning"]), str(row.get("text"))))

    def look(self, row: Row) -> list[Warned]:
        """Take in a new line. Returns what has to be said now."""
        if not self._seen.add(row):
            return []
        found = [(dog, what) for dog in WATCHDOGS if (what := dog.found(self._seen))]
        new = [Warned(dog.name, f"{what}: {dog.remedy}") for dog, what in found if dog.name not in self.said]
        self.held.update(dog.name for dog, _ in found if dog.name in self.said)
        for warned in new:
            self._note(row["step"], warned)
        return new

    def _note(self, step: int, warned: Warned) -> None:
        self.held[warned.name] += 1
        self.said[warned.name] = f"step {step}: {warned.text}"
