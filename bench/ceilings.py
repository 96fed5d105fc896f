"""What the device can do at most, measured, and the roofline that follows from it.

Per gene of a cell the cross-attention takes one exponential per patch and head, the two products of
attention, one table row (keys and values of all heads) and the gene and its value themselves. At
the paper's sizes and with bf16 tables that is 128 exponentials, 8,192 FLOP, 128 bytes from L2 and
3 bytes from device memory.

The roofline is the slowest of exponentials, matrix units and device memory. Exponentials are
counted at 16 per clock and multiprocessor, at the highest clock that the device states (where
PyTorch does not know it, at the measured rate, which always stands beside it). The L2 copy rate is
shown, but left out of the roofline: rows of common genes come from L1, so it is no ceiling.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from bench.measure import Effort, capture, time_calls

EXPONENTIALS_PER_CLOCK = 16  # of one multiprocessor, compute capability 8.0 to 10.0


class Work(NamedTuple):
    """What one gene of a cell takes."""

    exponentials: int
    flop: int
    l2_bytes: int
    memory_bytes: int

    @classmethod
    def of(cls, patches: int, heads: int, head_dim: int, dtype: torch.dtype) -> Work:
        pairs = patches * heads
        # float32 tables: three products of float16 numbers stand for one
        products = 3 if dtype == torch.float32 else 1
        flop = products * 2 * 2 * pairs * head_dim
        return cls(pairs, flop, 2 * heads * head_dim * dtype.itemsize, memory_bytes=3)

    def with_backward(self, heads: int, head_dim: int) -> Work:
        """Forward and backward, which starts from the genes and the log-sum-exp again.

        Five products follow the forward's two: scores, the gradient of weights, and the gradients
        of values, keys and queries. Gradients of keys and values are added up in float32.
        """
        return Work(
            exponentials=2 * self.exponentials,
            flop=self.flop // 2 * 7,
            l2_bytes=2 * self.l2_bytes + 2 * heads * head_dim * 4,
            memory_bytes=2 * self.memory_bytes,
        )


def measure_ceilings(device: torch.device, dtype: torch.dtype, toy: bool) -> dict[str, Any]:
    """Rates per second: bytes copied (read + written), in L2 too, FLOP, exponentials.

    On a CPU products are float32, and exponentials are left out (but for toys, in Triton's
    interpreter).
    """
    on_cpu = device.type == "cpu"
    if toy:
        effort, copied, size = Effort(0.0, 1, 1), 1 << 20, 256
    elif on_cpu:
        effort, copied, size = Effort(0.5, 3, 20), 1 << 28, 2048
    else:
        effort, copied, size = Effort(0.5, 10, 100), 1 << 30, 8192
    if on_cpu:
        dtype = torch.float32
    elif dtype == torch.float32:
        dtype = torch.float16  # the kernels multiply float32 tables as float16 numbers
    ceilings: dict[str, Any] = {
        "copy bytes/s": _copy(device, copied, effort),
        "L2 copy bytes/s": None,
        "matrix FLOP/s": _multiply(device, dtype, size, effort),
        "exponentials/s": None if on_cpu and not toy else _exponentials(device, toy, effort),
        "stated exponentials/s": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if hasattr(properties, "clock_rate"):  # kHz
            per_clock = EXPONENTIALS_PER_CLOCK * properties.multi_processor_count
            ceilings["stated exponentials/s"] = per_clock * properties.clock_rate * 1e3
        ceilings["L2 copy bytes/s"] = _copy(device, 4 << 20, effort, replays=100)
    return ceilings


def roofline(ceilings: dict[str, Any], work: Work) -> dict[str, float]:
    """Genes/s that each resource allows; ``"roofline"`` is the least of those that bound."""
    exponentials = ceilings["stated exponentials/s"] or ceilings["exponentials/s"]
    bounds = {
        "exponentials": exponentials / work.exponentials,
        "matrix units": ceilings["matrix FLOP/s"] / work.flop,
        "device memory": ceilings["copy bytes/s"] / work.memory_bytes,
    }
    least = min(bounds.values())
    if ceilings["L2 copy bytes/s"] is not None:
        bounds["L2 (not in the roofline)"] = ceilings["L2 copy bytes/s"] / work.l2_bytes
    return bounds | {"roofline": least}


def _copy(device: torch.device, size: int, effort: Effort, replays: int = 0) -> float:
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    if replays:
        replay = capture([copy] * replays, device)
        return 2 * size / time_calls([replay], device, effort, replays).median
    return 2 * size / time_calls([copy], device, effort).median


def _multiply(device: torch.device, dtype: torch.dtype, size: int, effort: Effort) -> float:
    a, b = torch.randn(2, size, size, device=device).to(dtype)  # zeros would run faster
    return 2 * size**3 / time_calls([partial(torch.mm, a, b)], device, effort).median


def _exponentials(device: torch.device, toy: bool, effort: Effort) -> float:
    """A chain of exponentials in registers, enough of them side by side to hide latency."""
    from bench.exponentials import BLOCK, STEPS, chain_exponentials

    programs = 2
    if device.type == "cuda":
        programs = 16 * torch.cuda.get_device_properties(device).multi_processor_count
    steps = 4 if toy else STEPS
    numbers = torch.rand(programs * BLOCK, device=device)

    def run() -> None:
        chain_exponentials[(programs,)](numbers, steps, num_warps=8)

    return len(numbers) * steps / time_calls([run], device, effort).median
