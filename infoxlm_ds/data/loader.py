"""Gives the batches of this rank's lanes, step by step. A thread makes them ahead. The
position counts consumed steps."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from infoxlm_ds.config import Recipe
from infoxlm_ds.data.batch import BatchBuilder, JointBatch
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.stream import LeftOut
from infoxlm_ds.data.upload import in_one_buffer

Cursors = dict[str, dict[int, tuple[int, int]]]  # stream -> lane -> (window, offset)
STEPS_AHEAD = 2


@dataclass(frozen=True)
class StepBatches:
    """A step's micro-batches of this rank, lowest lane first, and the positions of the streams after them."""

    lanes: list[JointBatch]
    cursors: Cursors


class Loader:
    """Iterates over steps without end. Rank `rank` of `world` runs the lanes l = rank (mod world)."""

    def __init__(self, recipe: Recipe, corpus: Corpus, rank: int, world: int, varlen: bool = False) -> None:
        """`varlen`: the batches go to a GPU that runs varlen attention."""
        self.lanes = recipe.batch.lanes_of(rank, world)
        self._builder = BatchBuilder(recipe, corpus, self.lanes, dense=not varlen)
        self._pinned = torch.cuda.is_available()
        self.cursors: Cursors = self._position()
        self.left_out: list[LeftOut] = []
        self.packs = sum(source.packs for source in corpus.sources)
        self._consumed = self._step = 0  # steps: taken, and made
        self._before = (0, self.cursors)
        self._ready: queue.Queue[StepBatches | BaseException] = queue.Queue(STEPS_AHEAD)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def restore(self, step: int, cursors: Cursors, left_out: Sequence[LeftOut] = ()) -> None:
        """Go on after `step` consumed steps, without the draws that were left out before. Call it only before the first
        `next`. A stream without a position starts at its beginning."""
        assert self._thread is None
        self._consumed = self._step = step
        self.left_out = list(left_out)
        for task, reader in self._builder.readers.items():
            if task in cursors:
                reader.restore({lane: cursors[task][lane] for lane in self.lanes}, left_out)
        self.cursors = self._position()

    def leave_out(self, draws: Sequence[LeftOut]) -> None:
        """Make the last step again, without these draws. Call it after a `next` that gave a step or raised
        DamagedDraw, on all ranks with the same draws."""
        self.close()
        self._stop, self._ready, self._thread = threading.Event(), queue.Queue(STEPS_AHEAD), None
        self.restore(*self._before, self.left_out)
        for what in draws:
            self._builder.readers[what.stream].leave_out(what.draw)
        self.left_out += draws
        self.cursors = self._position()

    def __next__(self) -> list[JointBatch]:
        """This rank's lanes of the next step. DamagedDraw if a pack is damaged."""
        self._before = (self._consumed, self.cursors)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        ready = self._ready.get()
        if isinstance(ready, BaseException):
            raise ready
        self._consumed, self.cursors = self._consumed + 1, ready.cursors
        return ready.lanes

    def close(self) -> None:
        """End the thread. If the process ended before it, the interpreter would stop the thread inside torch. That
        aborts the process ("terminate called without an active exception"), and its exit code is lost."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def longest_batch(self) -> JointBatch:
        """See `BatchBuilder.longest`. Takes nothing from the streams."""
        return self._builder.longest()

    def _position(self) -> Cursors:
        return {task: reader.state() for task, reader in self._builder.readers.items()}

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                lanes = [self._builder.build(lane, self._step) for lane in self.lanes]
                if self._pinned:
                    lanes = [in_one_buffer(lane, pinned=True) for lane in lanes]
                self._step += 1
                self._put(StepBatches(lanes, self._position()))
        except BaseException as error:  # the consumer raises it
            self._put(error)

    def _put(self, item: StepBatches | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=0.2)
            except queue.Full:
                continue
