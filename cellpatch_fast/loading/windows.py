"""Windows of cells as batches in memory: planned in order, assembled by workers.

`Assembly.plan` says which rows of which source a window needs and how much memory that takes;
`Assembly.batches`, in a worker, does it; `run` keeps workers busy within a bound of memory and
gives the batches in order.

There is no thread that plans: whenever the consumer asks for the next window, `run` starts as
many new ones as there are workers for and as the bound has room for. A consumer that is slow, or
stops, thus stops the reading by itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from ..cells import RaggedCells
from ..errors import InputError
from ..io.chunks.gathering import copy_rows
from ..preprocessing.masking import MaskCounts, Masked
from .rows import Part, Rows
from .sampler import Chosen, Window
from .slots import ALIGNMENT, Slot, Slots, slot_bytes

Mask = Callable[[RaggedCells, np.ndarray], Masked]  # of cells and their rows


@dataclass(frozen=True, eq=False)
class CellBatch:
    """Some cells, and what is known about them.

    Parameters
    ----------
    cells
        The cells; with masking what the encoder sees of them.
    rows
        int64 [cells]: their positions in the inputs, which follow each other.
    entries
        int64 [cells]: entries of known genes, hidden ones included.
    unknown_entries
        int64 [cells]: entries left out because the vocabulary lacks their gene.
    obs
        The requested columns: codes of categories (see `CellLoader.categories`; -1 is missing)
        or numbers, each [cells].
    targets
        With masking: the genes to predict of each cell, and their values.
    mask_counts
        With masking: what became of the entries.
    """

    cells: RaggedCells
    rows: np.ndarray
    entries: np.ndarray
    unknown_entries: np.ndarray
    obs: dict[str, np.ndarray] = field(default_factory=dict)
    targets: RaggedCells | None = None
    mask_counts: MaskCounts | None = None


Sent = tuple[CellBatch, torch.cuda.Event | None]  # with what tells that its copy is done


@dataclass(frozen=True, eq=False)
class Plan:
    """What a window needs.

    Parameters
    ----------
    window
        The window.
    rows
        int64 [cells]: its cells' rows in all sources together.
    parts
        The rows of each source that it needs, with their places in the window and how many
        entries they have at most.
    size
        Bytes of memory, at most.
    """

    window: Window
    rows: np.ndarray
    parts: list[tuple[Part, np.ndarray, int]]
    size: int


class Assembly:
    """How windows become batches.

    Parameters
    ----------
    sources
        The cells, one source after the other; all of the same types.
    chosen
        The rows that take part.
    obs
        The columns that batches carry, each [rows of all sources].
    mask
        Hides genes for pretraining.
    device
        Where the batches go; a CUDA device is fed from page-locked memory.
    """

    def __init__(
        self,
        sources: Sequence[Rows],
        chosen: Chosen,
        *,
        obs: Mapping[str, np.ndarray],
        mask: Mask | None,
        device: torch.device,
    ) -> None:
        self._sources, self._chosen, self._obs = sources, chosen, obs
        self._mask, self._device = mask, device
        self._starts = np.cumsum([0, *(len(source.offsets) - 1 for source in sources)])
        self._types = sources[0].types
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def pinned(self) -> bool:
        """Whether batches are made in page-locked memory."""
        return self._copies is not None

    @property
    def fixed_bytes(self) -> int:
        """Memory that each worker needs in any case."""
        return max(source.fixed_bytes for source in self._sources)

    @property
    def entry_bytes(self) -> int:
        """Memory that a window needs per stored entry."""
        of_window = sum(dtype.itemsize for dtype in self._types)
        return of_window + max(source.entry_bytes for source in self._sources)

    def lengths(self, positions: np.ndarray) -> np.ndarray:
        """int64 [cells]: stored entries of the chosen cells at ``positions``."""
        rows = self._chosen.rows(positions)
        lengths = np.empty(len(rows), np.int64)
        for which, places in self._by_source(rows):
            offsets, local = self._sources[which].offsets, rows[places] - self._starts[which]
            lengths[places] = offsets[local + 1] - offsets[local]
        return lengths

    def plan(self, window: Window) -> Plan:
        """To be called in the order of the windows, from one thread."""
        rows = self._chosen.rows(window.positions)
        parts, size = [], 0
        batches = len(window.cuts) - 1
        for which, places in self._by_source(rows):
            source, local = self._sources[which], rows[places] - self._starts[which]
            entries = int((source.offsets[local + 1] - source.offsets[local]).sum())
            size += entries * source.entry_bytes + self._slot_bytes(entries, len(local), batches)
            parts.append((source.part(local), places, entries))
        if len(parts) > 1:
            size *= 2  # each is made on its own
        if self._mask is not None:
            size *= 3  # what the encoder and the decoder get, at most
        return Plan(window, rows, parts, size)

    def batches(self, plan: Plan, slots: Slots) -> list[Sent]:
        """The batches of a window, on their way to the device; runs in a worker."""
        room = sum(entries for _, _, entries in plan.parts)
        slot = slots.take(self._slot_bytes(room, len(plan.rows), len(plan.window.cuts) - 1))
        genes, values = (
            slot.tensor(room, torch.from_numpy(np.empty(0, dtype)).dtype) for dtype in self._types
        )
        lengths, unknown = _write(plan, genes.numpy(), values.numpy())
        offsets = np.concatenate([[0], np.cumsum(lengths)])  # [c + 1]
        batches = []
        for start, stop in pairwise(plan.window.cuts.tolist()):
            first, last = int(offsets[start]), int(offsets[stop])
            batch_offsets = slot.tensor(stop - start + 1, torch.int64)
            np.subtract(offsets[start : stop + 1], first, out=batch_offsets.numpy())
            cells = RaggedCells(batch_offsets, genes[first:last], values[first:last])
            facts = plan.rows[start:stop], lengths[start:stop], unknown[start:stop]
            batches.append(self._sent(cells, facts, slot))
        return batches

    def received(self, sent: Sent) -> CellBatch:
        """The batch, for which the consumer's CUDA stream waits from now on."""
        batch, copied = sent
        if copied is not None:
            consumer = torch.cuda.current_stream(self._device)
            consumer.wait_event(copied)
            for cells in (batch.cells, batch.targets):
                for tensor in (cells.offsets, cells.genes, cells.values) if cells else ():
                    tensor.record_stream(consumer)
        return batch

    def _sent(
        self, cells: RaggedCells, facts: tuple[np.ndarray, np.ndarray, np.ndarray], slot: Slot
    ) -> Sent:
        """Cells as a batch, on the way to the device; ``facts`` are rows, entries, unknown ones."""
        rows, entries, unknown_entries = facts
        targets, counts = None, None
        if self._mask is not None:
            masked = self._mask(cells, rows)
            cells, targets, counts = masked.encoder, masked.decoder, masked.counts
        copied = None
        if self._copies is not None:
            if targets is not None:  # no longer in the slot; PyTorch looks after these
                cells, targets = cells.pin_memory(), targets.pin_memory()
            with torch.cuda.stream(self._copies):
                cells = cells.to(self._device, non_blocking=True)
                if targets is not None:
                    targets = targets.to(self._device, non_blocking=True)
                copied = self._copies.record_event()
            slot.copied(copied)
        obs = {name: column[rows] for name, column in self._obs.items()}
        batch = CellBatch(
            cells=cells,
            rows=rows,
            entries=entries,
            unknown_entries=unknown_entries,
            obs=obs,
            targets=targets,
            mask_counts=counts,
        )
        return batch, copied

    def _by_source(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The sources that ``rows`` lie in, each with the places of its rows."""
        if len(self._sources) == 1:
            yield 0, np.arange(len(rows))
            return
        sources = np.searchsorted(self._starts, rows, side="right") - 1
        for which in np.unique(sources).tolist():
            yield which, np.flatnonzero(sources == which)

    def _slot_bytes(self, entries: int, cells: int, batches: int) -> int:
        """Of the entries, and of the batches' offsets; a batch may have no cell."""
        offsets = (cells + batches) * 8 + batches * ALIGNMENT
        return offsets + slot_bytes(*((entries, dtype) for dtype in self._types))


def _write(plan: Plan, genes: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Write a window's cells one behind the other; their entries and those left out."""
    if len(plan.parts) == 1:
        return plan.parts[0][0].write(genes, values)
    lengths, unknown = (np.empty(len(plan.rows), np.int64) for _ in range(2))
    written = []
    for part, places, entries in plan.parts:
        part_genes, part_values = np.empty(entries, genes.dtype), np.empty(entries, values.dtype)
        lengths[places], unknown[places] = part.write(part_genes, part_values)
        written.append((part_genes, part_values))
    starts = np.cumsum(lengths) - lengths
    for (_, places, _), arrays in zip(plan.parts, written, strict=True):
        ends = np.cumsum(lengths[places])
        for source, target in zip(arrays, (genes, values), strict=True):
            copy_rows(source, ends - lengths[places], ends, target, starts[places])
    return lengths, unknown


def run(
    assembly: Assembly, windows: Iterator[Window], threads: int, memory_limit: int
) -> Generator[CellBatch]:
    """The batches of ``windows``, in order, which ``threads`` workers assemble.

    Close it to stop before the end. It ends when every worker has.

    Raises
    ------
    InputError
        If a window needs more memory than there may be.
    """
    threads = _affordable(threads, assembly.fixed_bytes, memory_limit)
    budget = memory_limit - threads * assembly.fixed_bytes
    plans = map(assembly.plan, windows)
    slots = Slots(pinned=assembly.pinned, most=threads + 1)
    workers = ThreadPoolExecutor(threads, thread_name_prefix="cellpatch-load")
    running: deque[tuple[int, Future[list[Sent]]]] = deque()
    used = 0
    try:
        following = next(plans, None)
        while following is not None or running:
            while following is not None and len(running) <= threads:
                if running and used + following.size > budget:
                    break
                _check_size(following, budget, memory_limit)
                used += following.size
                running.append((following.size, workers.submit(assembly.batches, following, slots)))
                following = next(plans, None)
            size, future = running.popleft()
            batches = future.result()
            del future
            while batches:
                yield assembly.received(batches.pop(0))
            used -= size
    finally:
        workers.shutdown(wait=True, cancel_futures=True)
        slots.close()


def _affordable(threads: int, fixed_bytes: int, memory_limit: int) -> int:
    """As many threads as leave half of the memory to the windows; one at least."""
    if fixed_bytes > memory_limit // 2:
        raise InputError(
            f"memory_limit is {memory_limit / 1e6:.3g} MB, but decoding the file's chunks takes "
            f"{fixed_bytes / 1e6:.3g} MB. Allow twice that, or store the file in smaller chunks."
        )
    return min(threads, max(1, memory_limit // 2 // max(fixed_bytes, 1)))


def _check_size(plan: Plan, budget: int, memory_limit: int) -> None:
    if plan.size <= budget:
        return
    rows, batches = plan.rows, len(plan.window.cuts) - 1
    if len(rows) == 1:
        what, advice = f"cell {rows[0]} alone", "Allow more memory"
    else:
        what = f"{batches} batches of {len(rows)} cells ({rows.min()} to {rows.max()})"
        advice = "Allow more memory, or choose a smaller batch_size, max_entries or buffer_size"
    raise InputError(
        f"memory_limit is {memory_limit / 1e6:.3g} MB, of which {budget / 1e6:.3g} MB are left "
        f"for cells, but {what} may take {plan.size / 1e6:.3g} MB. {advice}."
    )
