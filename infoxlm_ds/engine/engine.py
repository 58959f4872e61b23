"""The engine: a model under DeepSpeed. It runs micro-steps, says whether a step was applied, and gives and takes its
state as fragments.

Only this package knows DeepSpeed. docs/design.md ("The engine") lists the traps that it avoids.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import deepspeed
import torch
from torch import Tensor, nn

from infoxlm_ds import dist
from infoxlm_ds.config import Optimizer
from infoxlm_ds.engine.config import stage_of, summed_in
from infoxlm_ds.model.momentum import Fragment, WriteWhole

M = TypeVar("M", bound=nn.Module)

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, by torch's names
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what changes in a dynamic loss scale


class NotFinite(dist.AllRanksError):
    """Steps are not finite, and training cannot go on."""


@dataclass(frozen=True)
class _Place:
    """Where this rank's part of a parameter's fp32 master lies: the values `where` of the flat tensor `holder`. They
    begin at `start` of the flattened parameter number `parameter`."""

    parameter: int
    start: int
    holder: Tensor
    where: slice

    def of(self, flat: Tensor) -> Tensor:
        """The part's values [n] in a tensor that is laid out like `holder`."""
        return flat.detach().view(-1)[self.where]


class Engine:
    """A model under DeepSpeed: `lanes` micro-batches over all ranks make a step.

    `parameters`, `shapes`: of the module, by name, with the shapes that they have before they are sharded. `tied`: the
    other names of tied parameters, and the names under which they are listed.
    """

    def __init__(self, module: nn.Module, config: dict[str, Any], optimizer: Optimizer, lanes: int) -> None:
        self._settings, self._lanes = optimizer, lanes
        self.parameters = dict(module.named_parameters())
        self.shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}
        first = {id(p): name for name, p in self.parameters.items()}
        everything = module.named_parameters(remove_duplicate=False)
        self.tied = {name: first[id(p)] for name, p in everything if name != first[id(p)]}
        filled = config | {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": lanes // dist.world_size(),
            "gradient_clipping": optimizer.clip if stage_of(config) else 0.0,  # at stage 0 we clip: see `_clip`
            "steps_per_print": 10**9,
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also runs on the CPU, without a build
            "timers": {"throughput": {"enabled": False}},  # it synchronises the device twice in a micro-step
            "communication_data_type": summed_in(config),
        }
        adamw = torch.optim.AdamW(
            _groups(module, optimizer.weight_decay),
            lr=0.0,
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=True,
        )
        self._engine, self._adamw, _, _ = deepspeed.initialize(model=module, optimizer=adamw, config=filled)
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
        """Call the module."""
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
            group["lr"] = learning_rate_at(done + 1, self._settings)
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
        self._whole_norm, clip = float(norm), self._settings.clip
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
        fragments = self._fragments(parameters)
        if self.stage < 3:
            return fragments
        # Masters that are offloaded come to the device, where the key encoder's shards lie.
        return [Fragment(f.parameter, f.start, f.values.to(dist.device())) for f in fragments]

    def _fragments(self, parameters: Sequence[nn.Parameter]) -> list[Fragment]:
        return [Fragment(x.parameter, x.start, x.of(x.holder)) for x in self._places(parameters)]

    def _places(self, parameters: Sequence[nn.Parameter]) -> Iterator[_Place]:
        """All of these parameters that this rank holds. At stage 3, parts that are only padding are left out."""
        zero = self._engine.optimizer
        for i, p in enumerate(parameters):
            if self.stage == 0:
                yield _Place(i, 0, p, slice(0, p.numel()))
            elif self.stage == 3:  # cuts a parameter into equal parts and pads the last ones
                group, offset, size = zero.grad_position[zero.get_param_id(p)]
                start = dist.rank() * size
                if (own := min(size, p.ds_numel - start)) > 0:  # type: ignore[attr-defined]  # stage 3's own
                    yield _Place(i, start, zero.fp32_partitioned_groups_flat[group], slice(offset, offset + own))
            elif (mapping := p._hp_mapping) is not None:  # type: ignore[attr-defined]  # private; None: none of it is here
                address, here = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
                (holder,) = self._adamw.param_groups[mapping.param_group_index]["params"]
                yield _Place(i, address.start, holder, slice(here.start, here.start + here.numel))

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
        shards = _shards(parameters, fragments)
        return partial(torch._foreach_copy_, shards, [f.values for f in fragments]) if shards else lambda: None

    def state(self) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
        """This rank's fragments of the state of all parameters: a parameter's name, where the fragment begins in the
        flattened parameter, and its values [n]: the fp32 master and Adam's moments. They are the memory itself. After
        a change of it, call `resume`. Every rank holds everything if the engine is not `sharded`."""
        names = list(self.parameters)
        for place in self._places(list(self.parameters.values())):
            moments = self._adamw.state[place.holder]
            values = {"master": place.holder} | {kind: moments[kind] for kind in MOMENTS}
            yield names[place.parameter], place.start, {kind: place.of(flat) for kind, flat in values.items()}

    def counters(self) -> dict[str, Any]:
        """What the engine counts: steps, steps that were not applied and, in fp16, the state of the loss scale."""
        scaler = vars(self._engine.optimizer.loss_scaler) if self.adapts_loss_scale else {}
        return {
            "steps": self._engine.global_steps,
            "skipped": self._engine.skipped_steps,
            "loss_scale": {name: scaler[name] for name in SCALER if name in scaler},
        }

    @torch.no_grad()
    def resume(self, counters: dict[str, Any], applied: int) -> None:
        """Go on from the state that was put into the fragments of `state`, after `applied` steps. A loss scale is taken
        over if there was one. Collective."""
        ds = self._engine
        ds.global_steps, ds.skipped_steps = counters["steps"], counters["skipped"]
        ds.global_samples = ds.global_steps * ds.train_batch_size()
        ds.micro_steps = ds.global_steps * ds.gradient_accumulation_steps()
        if self.adapts_loss_scale:
            vars(ds.optimizer.loss_scaler).update(counters["loss_scale"])
        for moments in self._adamw.state.values():
            moments["step"].fill_(applied)
        self._compute_with_masters()

    def _compute_with_masters(self) -> None:
        """Set the weights that compute from the masters. Collective."""
        if self.stage in (1, 2):
            self._engine.optimizer.update_lp_params()
        elif self.stage == 3:
            parameters = list(self.parameters.values())
            fragments = self._fragments(parameters)
            for shard, fragment in zip(_shards(parameters, fragments), fragments, strict=True):
                shard.copy_(fragment.values)
            if persistent := self._engine.optimizer.persistent_parameters:
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)


def _shards(parameters: Sequence[nn.Parameter], fragments: Sequence[Fragment]) -> list[Tensor]:
    """Where this rank's shards of parameters at stage 3 hold these fragments."""
    return [parameters[f.parameter].ds_tensor.data[: len(f.values)] for f in fragments]  # type: ignore[attr-defined]


def learning_rate_at(step: int, settings: Optimizer) -> float:
    """The learning rate at step 1, 2, ...: linear warm-up to the highest at step `warmup`, then linear decay to 0 after
    the last step."""
    if step <= settings.warmup:
        return settings.learning_rate * (step / settings.warmup)
    return settings.learning_rate * max(0.0, (settings.steps + 1 - step) / (settings.steps + 1 - settings.warmup))


def _groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices are decayed, vectors (biases, LayerNorms) are not. The shape decides, because the names of tied weights
    depend on which of them comes first."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
