"""The engine: starts DeepSpeed, runs micro-steps, reports whether a step was applied, reads and writes fp32 masters.

Only this package knows DeepSpeed. docs/design.md ("The engine") lists the traps that it avoids.
"""

from __future__ import annotations

import copy
import ctypes
import math
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from infoxlm_ds.engine.config import stage_of, summed_in  # must come before DeepSpeed: it sets its device

# isort: split
import deepspeed
import torch
from deepspeed.utils import safe_get_local_fp32_param
from torch import Tensor, nn

from infoxlm_ds import dist
from infoxlm_ds.cluster import environment
from infoxlm_ds.config import Optimizer, Timeout
from infoxlm_ds.engine.files import CLIENT_STATE, Capture
from infoxlm_ds.model.momentum import Fragment, WriteWhole

M = TypeVar("M", bound=nn.Module)

PATIENT = Timeout()
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # of glibc's malloc.h


class NotJoined(RuntimeError):
    """The ranks did not come together."""


def start_ranks(timeout: Timeout = PATIENT, deterministic: bool = False) -> None:
    """Join the ranks of the launcher, or be the only rank. NotJoined if the others do not come in time.
    `deterministic`: kernels on GPUs give the same bits every time."""
    environment.settle()
    if torch.cuda.is_available():
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
            torch.use_deterministic_algorithms(True)
        torch.cuda.set_device(dist.local_rank())
    else:
        # Only inference uses this op; its build takes minutes, and a killed build hangs every later one.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        _keep_freed_memory()
    joining = timedelta(seconds=timeout.join)
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=joining)
        dist.host_group()  # made now, so that the next timeouts hold for it too
    except RuntimeError as error:
        if not dist.is_broken(error):
            raise
        raise NotJoined(
            f"rank {os.environ['RANK']} on {socket.gethostname()} did not meet the other ranks within {timeout.join} "
            f"seconds (timeout.join), at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: a host is slow to "
            "start, its start failed, or the network between hosts is closed; `infoxlm doctor --hostfile` checks. "
            f"{str(error).splitlines()[0]}"
        ) from None
    dist.set_timeout(timeout.start)


def _keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next step. It would return buffers of over 32 MB to the system at once,
    and the system would clear each page again: 3.3 s a step became 1.9 s with a vocabulary of 250,000, at ZeRO 1."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class NotFinite(dist.AllRanksError):
    """Steps are not finite, and training cannot go on."""


class Engine:
    """A model under DeepSpeed: `lanes` micro-batches over all ranks make a step."""

    def __init__(self, module: nn.Module, config: dict[str, Any], optimizer: Optimizer, lanes: int) -> None:
        self._recipe, self._lanes = optimizer, lanes
        filled = config | {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": lanes // dist.world_size(),
            "gradient_clipping": optimizer.clip if stage_of(config) else 0.0,  # at stage 0 we clip: see `_clip`
            "steps_per_print": 10**9,
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also runs on the CPU, without a build
            "timers": {"throughput": {"enabled": False}},  # it synchronises the device twice in a micro-step
            "communication_data_type": summed_in(config),
        }
        groups = _groups(module, optimizer.weight_decay)
        self._groups = [list(group["params"]) for group in groups]
        adamw = torch.optim.AdamW(
            groups,
            lr=0.0,
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=True,
        )
        self._engine, self._adamw, _, _ = deepspeed.initialize(model=module, optimizer=adamw, config=filled)
        self._engine._copy_recovery_script = lambda path: None  # `infoxlm checkpoint consolidate` replaces it
        self._config, self.stage = config, stage_of(config)
        if self.stage == 0 and dist.world_size() == 1:  # it would copy all gradients twice, to add up those of one rank
            self._engine.enable_backward_allreduce = False
        self._make_moments()
        self._whole_norm = math.nan  # gradient norm at stage 0, which DeepSpeed does not report

    def _make_moments(self) -> None:
        """Make Adam's moments now. torch makes them in the first update, after a rehearsal has measured memory."""
        zero = self._engine.optimizer
        groups = [group["params"] for group in self._adamw.param_groups]
        for master in zero.fp32_partitioned_groups_flat if self.stage == 3 else [p for group in groups for p in group]:
            self._adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(master, memory_format=torch.preserve_format),
            }

    def forward(self, *args: Any) -> Any:
        return self._engine(*args)

    def backward(self, share: Tensor) -> None:
        """Backward of one lane's share of the loss. DeepSpeed averages over ranks and micro-steps, but shares are to be
        added up. A share that is not finite makes all gradients not finite, so no rank applies the step."""
        poison = share.detach() * 0 + 1  # 1, or nan
        self._engine.backward(share * (self._lanes * poison))

    def step(self, done: int) -> bool:
        """To be called after each micro-step. `done`: optimizer steps applied so far. Returns True if
        this call applied one."""
        for group in self._adamw.param_groups:
            group["lr"] = self._recipe.learning_rate * schedule(done + 1, self._recipe)
        at_boundary = self._engine.is_gradient_accumulation_boundary()
        if at_boundary and self.stage == 0 and not self._clip():  # DeepSpeed would apply it
            self._engine.zero_grad()
            self._engine.set_gradient_accumulation_boundary(False)
            self._engine.step()  # only counts
            self._engine.set_gradient_accumulation_boundary(None)
            return False
        try:
            self._engine.step()
        except Exception as error:
            if "loss scale already at minimum" not in str(error):
                raise
            raise NotFinite("gradients overflow fp16 even at the smallest loss scale") from None
        applied = bool(at_boundary and self._engine.was_step_applied())
        if at_boundary and not applied and self.stage == 3:
            # A step that is not applied leaves persistent parameters sharded, and then the next step may fail.
            persistent = self._engine.optimizer.persistent_parameters
            if persistent:
                persistent[0].all_gather(persistent)
        return applied

    def _clip(self) -> bool:
        """Clip the gradients at stage 0. Returns whether they are finite."""
        parameters = [p for p in self._engine.module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._whole_norm, clip = float(norm), self._recipe.clip
        if 0 < clip < self._whole_norm < math.inf:
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        return math.isfinite(self._whole_norm)

    def rehearse(self, shares: Iterable[Tensor]) -> None:
        """Run a whole step, with one share of the loss for each lane. It is marked as not finite, so
        nothing of it stays."""
        scaler = copy.copy(getattr(self._engine.optimizer, "loss_scaler", None))
        for share in shares:
            self.backward(share * math.nan)
            self.step(0)
        if scaler is not None:
            self._engine.optimizer.loss_scaler = scaler

    @property
    def gradient_norm(self) -> float:
        """Global gradient norm of the last step, before clipping."""
        norm = self._engine.get_global_grad_norm()
        return self._whole_norm if norm is None else float(norm)

    @property
    def loss_scale(self) -> float:
        """The factor by which fp16 multiplies the loss; 1 in other precisions."""
        return float(self._engine.optimizer.loss_scale) if self._engine.fp16_enabled() else 1.0

    @property
    def adapts_loss_scale(self) -> bool:
        """Whether a step whose gradients overflowed may succeed with the next loss scale."""
        return self._engine.fp16_enabled() and bool(self._engine.dynamic_loss_scale())

    @property
    def optimizer(self) -> torch.optim.AdamW:
        """The optimizer that steps on this rank's masters."""
        return self._adamw

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a different fragment of the fp32 masters."""
        return self.stage > 0 and dist.world_size() > 1

    def masters(self, parameters: Sequence[nn.Parameter]) -> list[Fragment]:
        """This rank's fragments of the fp32 masters of these parameters of the module."""
        if self.stage == 0:
            return [Fragment(i, 0, p.detach().flatten()) for i, p in enumerate(parameters)]
        if self.stage == 3:
            return [self._shard(i, p, safe_get_local_fp32_param(p)) for i, p in enumerate(parameters)]
        fragments = []
        for i, parameter in enumerate(parameters):
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # private in 0.19; None: this rank holds nothing of it
            if mapping is not None:
                address = mapping.lp_fragment_address
                fragments.append(Fragment(i, address.start, mapping.get_hp_fragment().flatten()))
        return fragments

    def copy(self, module: M) -> M:
        """Prepare another module, which is not trained, in the engine's precision and layout."""
        module = module.eval().requires_grad_(False)
        if self.stage == 3:
            # Persistent parameters stay gathered, and would not get the values that `writer` puts into a shard.
            # Without overlap, weights are gathered in the order of the default stream, after what `writer` puts there.
            zero = self._config["zero_optimization"] | {"stage3_param_persistence_threshold": 0, "overlap_comm": False}
            zero.pop("offload_optimizer", None)
            untrained = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_optimization": zero}
            deepspeed.initialize(model=module, config=self._config | untrained)
            return module
        for parameter in module.parameters():  # buffers, such as the frequencies of rotary positions, stay in fp32
            parameter.data = parameter.to(self._engine.get_data_types()[0])
        return module.to(dist.device())

    def writer(self, parameters: Sequence[nn.Parameter], fragments: Sequence[Fragment]) -> Callable[[], None]:
        """A function that sets parameters of a `copy` from fragments, such as `masters` gives, each time with the
        values of that moment. Stage 3 needs no collective, because the copy is cut into the same shards."""
        if self.stage < 3:
            return WriteWhole(parameters, fragments, self.sharded)
        pairs = [(parameters[f.parameter].ds_tensor, f.values) for f in fragments]  # type: ignore[attr-defined]  # stage 3's own
        shards = [shard.data[: len(values)] for shard, values in pairs]
        return partial(torch._foreach_copy_, shards, [values for _, values in pairs])

    def _shard(self, number: int, parameter: nn.Parameter, values: Tensor) -> Fragment:
        """Stage 3 cuts a parameter into equal parts and pads the last ones."""
        start = dist.rank() * len(values)
        size: int = parameter.ds_numel  # type: ignore[attr-defined]  # stage 3's own
        return Fragment(number, start, values[: max(0, min(len(values), size - start))])

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """This rank's files of a checkpoint, by name, as DeepSpeed would pickle them. They hold the tensors
        themselves, not copies. Collective."""
        capture, own = Capture(), self._engine.checkpoint_engine
        self._engine.checkpoint_engine = capture
        try:
            self._engine.save_checkpoint("captured", tag="", client_state=CLIENT_STATE, save_latest=False)
        finally:
            self._engine.checkpoint_engine = own
        return capture.files

    def load(self, folder: Path, universal: bool = False) -> None:
        """Load the files that the same number of ranks wrote. If `universal`, load those that `engine.files.convert`
        made from another number's files."""
        settings = [dict(group) for group in self._adamw.param_groups]
        # Set only for this load: if it stayed, stage 3 would write the model's state only on rank 0 (DeepSpeed #7546).
        self._engine._config.load_universal_checkpoint = universal
        self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        self._engine._config.load_universal_checkpoint = False
        if universal:
            self._set_apart(settings)

    @property
    def loads_universal(self) -> bool:
        """Whether this rank can load a universal checkpoint. With very many ranks, a rank may hold nothing but padding
        of the vectors or of the matrices. Below stage 3, DeepSpeed fails then."""
        return self.stage == 3 or all(any(p._hp_mapping is not None for p in group) for group in self._groups)

    def _set_apart(self, settings: list[dict[str, Any]]) -> None:
        """Undo what loading a universal checkpoint does at stage 3: all groups get the first group's settings, and all
        states share one tensor that counts steps."""
        for group, own in zip(self._adamw.param_groups, settings, strict=True):
            group.update({key: value for key, value in own.items() if key != "params"})
        for state in self._adamw.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()


def schedule(step: int, recipe: Optimizer) -> float:
    """Factor of the learning rate at step 1, 2, ...: linear warm-up to 1 at step `warmup`, then linear decay to 0
    after the last step."""
    if step <= recipe.warmup:
        return step / recipe.warmup
    return max(0.0, (recipe.steps + 1 - step) / (recipe.steps + 1 - recipe.warmup))


def _groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices are decayed, vectors (biases, LayerNorms) are not. The shape decides, because the names of tied weights
    depend on which of them comes first."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
