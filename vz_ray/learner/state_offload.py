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

import contextlib
import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vz_ray.utils.errors import UserError

log = logging.getLogger(__name__)

_MIN_BYTES = 64
"""Smaller storages stay: the step counts of an optimizer are read while the moments are in host memory."""
_ALIGN = 64
_WALKED_PACKAGES = ("deepspeed.runtime", "torch.optim", "vz_ray.learner")
"""Packages whose objects are searched for tensors."""
_FREE_TIMEOUT_S = 60.0
"""Maximum wait of `load` for device memory: processes of a killed engine can hold memory for seconds."""
_FREE_POLL_S = 0.2


class StateOffloader:
    """States of one rank, on the device or in host memory.

    The host buffer is pinned on GPUs and kept for the next cycle: pinning takes longer than copying.

    Args:
        module: The trained module.
        others: Further objects that hold tensors: optimizers, frozen modules.
        device: Tensors on other devices stay where they are.
    """

    def __init__(self, module: nn.Module, others: Iterable[Any], device: torch.device) -> None:
        self._module, self._roots, self._device = module, [module, *others], device
        self._host: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}
        self._freed_scratch: list[tuple[torch.UntypedStorage, int]] = []
        self._arena = HostArena(is_pinned=device.type == "cuda")

    @property
    def has_weights_on_host(self) -> bool:
        """Whether the module's parameters are in host memory."""
        return any(storage._cdata in self._host for storage in self._weight_storages())

    def offload(self, *, keep_weights: bool = False) -> int:
        """Move the states to host memory and return the number of bytes moved. States that are there stay.

        Args:
            keep_weights: Keep the parameters on the device, to publish them.
        """
        self._synchronize()  # DeepSpeed gathers and reduces on streams of its own
        kept = {storage._cdata for storage in self._weight_storages()} if keep_weights else set()
        for storage in self._device_storages(self._scratch()):
            self._freed_scratch.append((storage, storage.nbytes()))
            storage.resize_(0)
        moved = [storage for storage in self._device_storages(self._roots) if storage._cdata not in kept]
        num_bytes = sum(storage.nbytes() for storage in moved)
        for storage, buffer in zip(moved, self._arena.take([storage.nbytes() for storage in moved]), strict=True):
            buffer.copy_(_as_bytes(storage), non_blocking=True)
            self._host[storage._cdata] = (storage, buffer)
        self._synchronize()
        for storage in moved:
            storage.resize_(0)
        self._release_cached_memory()
        return num_bytes

    def load(self) -> int:
        """Move all states to the device and return the number of bytes moved.

        Raises:
            UserError: The device had too little free memory for 60 s.
        """
        num_bytes = sum(buffer.nbytes for _, buffer in self._host.values())
        if self._device.type == "cuda":
            needed = num_bytes + sum(size for _, size in self._freed_scratch)
            wait_for_memory(needed, self._free_bytes)
        for storage, size in self._freed_scratch:
            storage.resize_(size)
        self._freed_scratch.clear()
        for storage, buffer in self._host.values():
            storage.resize_(buffer.nbytes)
            _as_bytes(storage).copy_(buffer, non_blocking=True)
        self._synchronize()
        self._host.clear()
        self._arena.free()
        return num_bytes

    def on_host(self, tensor: Tensor) -> Tensor:
        """Return the same elements in host memory if the tensor's storage is there, else the tensor itself."""
        entry = self._host.get(tensor.untyped_storage()._cdata)
        if entry is None:
            return tensor
        buffer = entry[1]
        start = int(buffer.storage_offset()) // tensor.itemsize + int(tensor.storage_offset())
        view = torch.empty(0, dtype=tensor.dtype)
        return view.set_(buffer.untyped_storage(), start, tensor.size(), tensor.stride())

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

    def _free_bytes(self) -> int:
        """Return the bytes that this process can allocate on its GPU."""
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return torch.cuda.mem_get_info(self._device)[0] + cached

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _release_cached_memory(self) -> None:
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.ipc_collect()  # memory that an engine had opened
            torch.cuda.empty_cache()


class HostArena:
    """Host memory for storages, in one block per `take`. Blocks are kept after `free` and reused.

    torch's pinned allocator rounds each buffer up to a power of two and never returns it to the system, so pinned
    blocks are registered here, with their exact size.

    Args:
        is_pinned: Whether to pin blocks for copies from GPUs. If pinning fails, blocks stay pageable.
    """

    def __init__(self, *, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self._blocks: list[Tensor] = []
        self._used = 0

    def take(self, sizes: list[int]) -> list[Tensor]:
        """Return a buffer of bytes for each size in bytes, aligned for every dtype."""
        starts, end = [], 0
        for size in sizes:
            starts.append(end)
            end += size + -size % _ALIGN
        if not end:
            return []
        if self._used < len(self._blocks) and self._blocks[self._used].nbytes < end:
            self._drop(self._used)
        if self._used == len(self._blocks):
            self._blocks.append(self._allocate(end))
        block = self._blocks[self._used]
        self._used += 1
        return [block[start : start + size] for start, size in zip(starts, sizes, strict=True)]

    def free(self) -> None:
        """Let the next `take` reuse the blocks."""
        if self._used:
            self._drop(self._used)
        self._used = 0

    def _allocate(self, num_bytes: int) -> Tensor:
        block = torch.empty(num_bytes, dtype=torch.uint8)
        if self._is_pinned:
            error = int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), num_bytes, 0))
            if error:
                log.warning(
                    "Pinning %d bytes of host memory failed: CUDA error %d. Copies are slower.", num_bytes, error
                )
                with contextlib.suppress(RuntimeError):
                    torch.zeros(1, device="cuda")  # otherwise the next kernel would report the error
        return block

    def _drop(self, first: int) -> None:
        """Return the blocks from index `first` on to the system."""
        for block in self._blocks[first:]:
            if self._is_pinned and block.is_pinned():
                torch.cuda.cudart().cudaHostUnregister(block.data_ptr())
        del self._blocks[first:]


def wait_for_memory(needed: int, read_free: Callable[[], int], timeout_s: float = _FREE_TIMEOUT_S) -> None:
    """Wait until the device has free memory.

    Args:
        needed: Bytes.
        read_free: Returns the free bytes.
        timeout_s: Maximum wait.

    Raises:
        UserError: Less than `needed` bytes are free after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while (free := read_free()) < needed:
        if time.monotonic() > deadline:
            raise UserError(
                f"the learner's states need {needed / 2**30:.2f} GiB of GPU memory and {free / 2**30:.2f} are free "
                f"after waiting {timeout_s:g} s; stop other processes on this GPU"
            )
        time.sleep(_FREE_POLL_S)


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
