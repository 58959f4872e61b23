"""How fast a GPU runs a step, by a model of its parts. The rates are assumptions that no GPU has confirmed yet: matrix
products at 61 % of the peak, those of the LM head at 56 %, attention at 30 %, memory at 90 % of its bandwidth. What
ranks send and what the loader needs is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from infoxlm_ds.planner.cost import body_operations, flops, head_operations, tokens_per_step
from infoxlm_ds.planner.memory import partition
from infoxlm_ds.planner.workload import Setting

MATRICES, HEAD, ATTENTION, MEMORY = 0.61, 0.56, 0.30, 0.90  # shares of the peaks
ROW_VECTORS = 80  # vectors of the width that LayerNorm, GELU, residuals and biases move for a row of a layer
LOGIT_ELEMENTS = 7  # see losses/masked_lm.py
GRADIENT_BYTES = 54  # moved for each parameter in each lane: zeroed, written and added up in fp32
UPDATE_BYTES, AVERAGE_BYTES = 28, 14  # moved for each master by AdamW, and for each of the key encoder's averages
GAP = 1.5e-3  # seconds of a lane in which the GPU waits for the host


@dataclass(frozen=True)
class Gpu:
    """`peak`: dense 16-bit operations a second; `bandwidth`: bytes a second of its memory."""

    name: str
    peak: float
    bandwidth: float


# From NVIDIA's data sheets of the SXM modules, where there are several.
GPUS = (
    Gpu("B200", 2250e12, 8.0e12),
    Gpu("H200", 989e12, 4.8e12),
    Gpu("H100", 989e12, 3.35e12),
    Gpu("A100", 312e12, 2.0e12),
    Gpu("L40S", 362e12, 0.864e12),
    Gpu("V100", 125e12, 0.9e12),
    Gpu("T4", 65e12, 0.32e12),
)
ASSUMED = GPUS[2]


def known_gpu(name: str) -> Gpu | None:
    """The GPU that a device's name, such as `NVIDIA H100 80GB HBM3`, stands for."""
    return next((gpu for gpu in GPUS if gpu.name in name.replace("-", " ").split()), None)


def step_seconds(s: Setting, gpu: Gpu = ASSUMED) -> dict[str, float]:
    """Seconds of a step on each rank, by part."""
    matrices, attention = body_operations(s)
    share, bytes_a_second = 1 / s.world, MEMORY * gpu.bandwidth
    logits = s.recipe.batch.lanes * (s.masked("mmlm") + s.masked("tlm")) * s.shape.vocabulary
    rows = s.recipe.batch.lanes * sum(part.finished for part in s.parts())
    head, of_contrast = head_operations(s), flops(s)["xlco logits"]
    held = partition(s)
    return {
        "matrices": share * matrices / (MATRICES * gpu.peak),
        "attention": share * attention / (ATTENTION * gpu.peak),
        "elementwise": share * rows * ROW_VECTORS * s.element * s.shape.width / bytes_a_second,
        "LM head": share * (head / (HEAD * gpu.peak) + logits * LOGIT_ELEMENTS * s.element / bytes_a_second),
        "contrast": share * of_contrast / (HEAD * gpu.peak / 16),  # in fp32, without tensor cores
        "gradients": s.accumulation * GRADIENT_BYTES * s.shape.whole / bytes_a_second,
        "update": (UPDATE_BYTES * held.held + AVERAGE_BYTES * held.momentum * s.has_momentum) / bytes_a_second,
        "gaps": s.accumulation * GAP,
    }


def tokens_per_second(s: Setting, gpu: Gpu = ASSUMED) -> float:
    """Tokens a second of one GPU."""
    return tokens_per_step(s) / (s.world * sum(step_seconds(s, gpu).values()))


def mfu(operations: float, seconds: float, peak: float, world: int) -> float:
    """Model FLOPs utilisation of a step: its useful operations as a share of what all ranks could do in so many
    seconds. `peak`: operations a second of one rank."""
    return operations / (seconds * peak * world)
