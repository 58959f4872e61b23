"""A pretended accelerator on stock torch: what would hold up the host on a GPU, and how many kernels would run there.

Its tensors compute on a CPU, but torch takes them for tensors of a device called `pretend`. To register such a device
cannot be undone, autograd must not have run before, and its threads for the device survive no fork: use it only in a
process that was spawned for it. It knows no streams and no times, and code that asks for CUDA by name takes its other
branch.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import infoxlm_ds

NAME = "pretend"
OURS = Path(infoxlm_ds.__file__).parent
# On CUDA, the shape of the result or an answer of the solver is read back. Boolean indices are `nonzero` too.
READ_BACK = {
    "_local_scalar_dense",
    "_linalg_svd",
    "_unique2",
    "bincount",
    "equal",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
NO_KERNEL = {"empty", "empty_like", "new_empty", "_unsafe_view", "_reshape_alias"}


class Sync(NamedTuple):
    """Something that holds up the host until the device is done, and the line of ours that asks for it."""

    kind: str
    place: str


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class PretendedTensor(Tensor):
    """A tensor of the pretended device. `on_host`: its values."""

    on_host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, on_host: Tensor) -> PretendedTensor:
        made: PretendedTensor = Tensor._make_wrapper_subclass(
            cls,
            on_host.shape,
            strides=on_host.stride(),
            storage_offset=on_host.storage_offset(),
            dtype=on_host.dtype,
            device=torch.device(NAME, 0),
        )
        made.on_host = on_host
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, PretendedTensor)
        self.on_host = value.on_host

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"{func} outside of PretendedDevice")


class PretendedDevice(TorchDispatchMode):
    """While it is active, `syncs` and `kernels` (by the name of the operation) of the pretended device are recorded,
    and tensors on two devices in one operation raise RuntimeError."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if torch._C._get_privateuse1_backend_name() != NAME:
            _setup_privateuseone_for_python_backend(NAME, _Backend())
        self.device = torch.device(NAME, 0)
        self.syncs: list[Sync] = []
        self.kernels: Counter[str] = Counter()
        self.uploads: list[str] = []  # that do not hold up the host
        self._pinned: dict[int, Tensor] = {}
        self._made = {name: getattr(torch, name) for name in ("tensor", "as_tensor")}

    def clear(self) -> None:
        self.syncs, self.uploads, self.kernels = [], [], Counter()

    def __enter__(self) -> PretendedDevice:
        for name, make in self._made.items():
            setattr(torch, name, self._through_the_host(make))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for name, make in self._made.items():
            setattr(torch, name, make)

    def _through_the_host(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`torch.tensor` and its like write to the device from C++, where no Python tensor can be written."""

        def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            if isinstance(data, PretendedTensor):
                return make(data, *args, device=device, **kwargs)
            x = make(data, *args, **kwargs)
            return x if device is None else x.to(device)

        return made

    def move(self, module: nn.Module) -> nn.Module:
        """Move a module to the device. Tied parameters stay tied."""
        moved: dict[Tensor, Any] = {}
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None and not isinstance(p, PretendedTensor):
                    make = nn.Parameter(p.detach().to(self.device), p.requires_grad)
                    part._parameters[name] = moved.setdefault(p, make)
            for name, b in part._buffers.items():
                if b is not None:
                    part._buffers[name] = b.to(self.device)
        return module

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func._schema.name.removeprefix("aten::")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in tensors if isinstance(x, PretendedTensor)]
        to = kwargs.get("device")
        lands_there = bool(there) if to is None else torch.device(to).type == NAME
        if not there and not lands_there:
            return self._host_op(func, name, args, kwargs)
        if name in ("_to_copy", "copy_"):
            self._copy(func, name, args, kwargs, lands_there)
        elif len(there) < len(tensors):
            raise RuntimeError(f"{name} at {_place()}: tensors on two devices")
        self._note(func, name, args, kwargs)
        if lands_there and to is not None:
            kwargs["device"] = torch.device("cpu")
        hosts = tree_map_only(PretendedTensor, lambda x: x.on_host, (args, kwargs))
        out = func(*hosts[0], **hosts[1])
        if not lands_there or name == "copy_":
            return args[0] if name == "copy_" else out
        known = {id(x.on_host): x for x in there}  # an operation in place returns its own argument
        return tree_map_only(Tensor, lambda x: known[id(x)] if id(x) in known else PretendedTensor(x), out)

    def _host_op(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        if name == "_pin_memory":
            return self._pin(args[0].clone())
        if name == "is_pinned":
            return _storage(args[0]) in self._pinned
        pinned = kwargs.pop("pin_memory", False)
        out = func(*args, **kwargs)
        return self._pin(out) if pinned else out

    def _pin(self, x: Tensor) -> Tensor:
        self._pinned[_storage(x)] = x  # kept alive: its address must not be used again
        return x

    def _copy(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], lands_there: bool) -> None:
        target, source = (None, args[0]) if name == "_to_copy" else (args[0], args[1])
        if target is not None:
            lands_there = isinstance(target, PretendedTensor)
        waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if lands_there and not isinstance(source, PretendedTensor):
            if waits or _storage(source) not in self._pinned:
                self.syncs.append(Sync("upload that blocks" if waits else "upload from pageable memory", _place()))
            else:
                self.uploads.append(_place())
        elif not lands_there and waits:
            self.syncs.append(Sync("download", _place()))

    def _note(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        sized = name != "repeat_interleave" or kwargs.get("output_size") is not None or not isinstance(args[0], Tensor)
        if name in READ_BACK or by_mask or not sized:
            self.syncs.append(Sync(name, _place()))
        aliases = [r.alias_info for r in func._schema.returns]
        if name not in NO_KERNEL and not any(a is not None and not a.is_write for a in aliases):
            self.kernels[name] += 1


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _place() -> str:
    """The innermost line of our code."""
    frame: FrameType | None = sys._getframe(1)
    outside = "a backward pass"
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(OURS):
            return f"{path.relative_to(OURS)}:{frame.f_lineno}"
        if path.name.startswith("test_") and outside == "a backward pass":
            outside = f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return outside
