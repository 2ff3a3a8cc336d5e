"""Move the learner's states between its device and host memory, in place.

    on the device     parameters, gradients, master weights, moments, reference model
      offload |   ^   copy every storage to a host buffer, then empty the storage
              v   |   load: allocate the storages again and copy the buffers back
    in host memory

Only storages change. Tensors that share one, such as DeepSpeed's views of its flat buffers, need no repair, so
one mechanism serves every ZeRO stage, optimizer and frozen module. DeepSpeed's own `offload_states` requires
its FusedAdam at stage 3 and keeps frozen parameters on the device.
"""

from __future__ import annotations

import gc
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_MIN_BYTES = 64
"""Smaller storages stay: the step counts of an optimizer are read while the moments are in host memory."""
_WALKED_PACKAGES = ("deepspeed.runtime", "torch.optim", "vz_ray.learner")
"""Packages whose objects are searched for tensors."""


class StateOffloader:
    """States of one rank, on the device or in host memory.

    Host buffers are pinned on GPUs and kept for the next cycle: pinning takes longer than copying.

    Args:
        module: The trained module.
        others: Further objects that hold tensors: optimizers, frozen modules.
        device: Tensors on other devices stay where they are.
    """

    def __init__(self, module: nn.Module, others: Iterable[Any], device: torch.device) -> None:
        self._module, self._roots, self._device = module, [module, *others], device
        self._host: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}
        self._freed_scratch: list[tuple[torch.UntypedStorage, int]] = []
        self._spare_buffers: dict[int, list[Tensor]] = defaultdict(list)

    @property
    def has_weights_on_host(self) -> bool:
        """Whether the module's parameters are in host memory."""
        return any(storage._cdata in self._host for storage in self._weight_storages())

    def offload(self, *, keep_weights: bool = False) -> int:
        """Move the states to host memory and return the number of bytes moved. States that are there stay.

        Args:
            keep_weights: Keep the parameters on the device, to publish them.
        """
        kept = {storage._cdata for storage in self._weight_storages()} if keep_weights else set()
        for storage in self._device_storages(self._scratch()):
            self._freed_scratch.append((storage, storage.nbytes()))
            storage.resize_(0)
        moved: list[torch.UntypedStorage] = []
        for storage in self._device_storages(self._roots):
            if storage._cdata in kept:
                continue
            buffer = self._take_buffer(storage.nbytes())
            buffer.copy_(_as_bytes(storage), non_blocking=True)
            self._host[storage._cdata] = (storage, buffer)
            moved.append(storage)
        self._synchronize()
        num_bytes = sum(storage.nbytes() for storage in moved)
        for storage in moved:
            storage.resize_(0)
        self._spare_buffers.clear()  # of storages that no longer exist
        self._release_cached_memory()
        return num_bytes

    def load(self) -> int:
        """Move all states to the device and return the number of bytes moved."""
        num_bytes = 0
        for storage, size in self._freed_scratch:
            storage.resize_(size)
        self._freed_scratch.clear()
        for storage, buffer in self._host.values():
            storage.resize_(buffer.nbytes)
            _as_bytes(storage).copy_(buffer, non_blocking=True)
            num_bytes += buffer.nbytes
        self._synchronize()
        for _, buffer in self._host.values():
            self._spare_buffers[buffer.nbytes].append(buffer)
        self._host.clear()
        return num_bytes

    def on_host(self, tensor: Tensor) -> Tensor:
        """Return the same elements in host memory if the tensor's storage is there, else the tensor itself."""
        entry = self._host.get(tensor.untyped_storage()._cdata)
        if entry is None:
            return tensor
        storage = entry[1].untyped_storage()
        view = torch.empty(0, dtype=tensor.dtype)
        return view.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())

    def _scratch(self) -> Iterator[Any]:
        """Yield DeepSpeed's buffers for reducing gradients: gigabytes without content between steps."""
        for root in self._roots:
            for bucket in getattr(root, "ipg_buckets", {}).values():
                yield bucket.buffer

    def _device_storages(self, roots: Iterable[Any]) -> Iterator[torch.UntypedStorage]:
        """Yield the non-empty storages of tensors on the device, each once."""
        seen: set[int] = set()
        for tensor in find_tensors(roots):
            if tensor.device != self._device:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in seen and storage.nbytes() >= _MIN_BYTES and storage.resizable():
                seen.add(storage._cdata)
                yield storage

    def _weight_storages(self) -> Iterator[torch.UntypedStorage]:
        for parameter in self._module.parameters():
            yield parameter.data.untyped_storage()
            if hasattr(parameter, "ds_tensor"):  # the rank's shard under ZeRO-3
                yield parameter.ds_tensor.untyped_storage()

    def _take_buffer(self, num_bytes: int) -> Tensor:
        if spare := self._spare_buffers[num_bytes]:
            return spare.pop()
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _release_cached_memory(self) -> None:
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.ipc_collect()  # memory that an engine had opened
            torch.cuda.empty_cache()


def find_tensors(roots: Iterable[Any]) -> Iterator[Tensor]:
    """Yield all tensors that modules, optimizers and containers hold, including gradients and attributes of tensors."""
    seen: dict[int, Any] = {}  # keeps the objects alive, so that no id is reused
    stack = list(roots)
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, Tensor):
            yield item
            stack += [*vars(item).values(), *([item.grad] if item.is_leaf else [])]
        elif isinstance(item, Mapping):
            stack += [*item.keys(), *item.values()]  # optimizers map parameters to states
        elif isinstance(item, list | tuple | set | frozenset | deque):
            stack += item
        elif isinstance(item, nn.Module) or type(item).__module__.startswith(_WALKED_PACKAGES):
            stack += getattr(item, "__dict__", {}).values()


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
