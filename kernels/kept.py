"""Tables made from weights, kept for the weights used last.

A backend computes from tables that take longer to make than a small batch takes to encode.
Whoever calls it passes weights; whether they are those of the last call is decided here.
"""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .weights import EncoderWeights

TablesT = TypeVar("TablesT")

_LIMIT = 2  # sets of weights


class Kept(Generic[TablesT]):
    """What ``make(weights, *choices)`` returned for the weights and choices used last.

    A change of a weight is noticed by the tensor's address and version, which every in-place
    operation of PyTorch counts up (writing through ``.data`` does not: call `forget` after that).
    Fused optimisers do not either; what they leave out is made up for at the end of this file.
    The weights are held on to, so an address cannot be given to another tensor meanwhile.

    On a GPU, tables are made on the current stream; another stream waits for that. Nothing is kept
    while a CUDA graph is captured: a replay must see the weights of its own time.
    """

    def __init__(self, make: Callable[..., TablesT]) -> None:
        self._make = make
        self._kept: OrderedDict[Hashable, tuple[EncoderWeights, TablesT, Any]] = OrderedDict()
        self._making = threading.Lock()

    def of(self, weights: EncoderWeights, *choices: Hashable) -> TablesT:
        """The tables, made anew if need be."""
        tensors, structure = weights.flatten()
        on_gpu = tensors[0].device.type == "cuda"
        if on_gpu and (
            torch.cuda.is_current_stream_capturing() or any(t.is_inference() for t in tensors)
        ):
            return self._make(weights, *choices)
        key = (*structure, *choices, *(_identity(tensor) for tensor in tensors))
        with self._making:
            if key not in self._kept:
                # detached: they hold the memory itself, which a parameter may exchange for other
                held = EncoderWeights.unflatten([t.detach() for t in tensors], structure)
                tables = self._make(weights, *choices)
                self._kept[key] = held, tables, _Made(tensors[0].device) if on_gpu else None
                while len(self._kept) > _LIMIT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            _, tables, made = self._kept[key]
        if made is not None:
            made.share(tables)
        return tables

    def forget(self) -> None:
        """Drop everything that is kept."""
        self._kept.clear()


class _Made:
    """When and on which stream of a GPU tables were made."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._event = self._stream.record_event()

    def share(self, tables: Any) -> None:
        """Make the current stream wait, and the memory outlive its use of it."""
        stream = torch.cuda.current_stream(self._stream.device)
        if stream != self._stream:
            stream.wait_event(self._event)
            for tensor in tables:
                if isinstance(tensor, Tensor):
                    tensor.record_stream(stream)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    # Tensors made in inference mode count no versions. A checksum of the paper's gene table
    # takes 3 ms, its tables 300 ms.
    if tensor.is_inference():
        version = zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data)
    else:
        version = tensor._version
    return tensor.device, tensor.data_ptr(), version, tensor.dtype, tensor.shape, tensor.stride()


def _count_fused_step(optimizer: Optimizer, *_: Any) -> None:
    """Count up the versions of what a fused optimiser has just changed, which it does not itself.

    Else a model that is evaluated between steps would be so with the tables of its first weights.
    """
    for group in optimizer.param_groups:
        if group.get("fused"):
            for weight in group["params"]:
                if weight.grad is not None:
                    torch.autograd.graph.increment_version(weight)


register_optimizer_step_post_hook(_count_fused_step)
