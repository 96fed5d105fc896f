"""Codecs for the token store: ``python bench/codecs.py [--data FILE.h5ad] [--output FILE.json]``.

Genes (uint16, as they are and as differences) and values (uint8) of generated cells are cut into
chunks, encoded and decoded by every codec, on one core and in memory. Decoding ends with the
numbers in the array that a batch is made of, so summing up the differences is part of it. Chunks
are all full, as in the store. With ``--data`` the same for the cells of an AnnData file.

Runs of all codecs and chunk sizes alternate. Rates are millions of entries (non-zeros) per second
of processor time, which leaves out what a busy machine gives to others: the median, and for
decoding the fastest run as well, which is what a core does with its caches to itself.

Whoever wants a run of consecutive cells somewhere in the store has to decode the chunks at its ends
as well. The last table has the time for runs of 64 cells at random places against that for the same
entries in order, by chunk size, with the codecs that were chosen.

Prints Markdown (the store's chunk size; the JSON has all) and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from numcodecs import blosc
from numcodecs.delta import Delta
from numcodecs.zstd import Zstd

from bench.cells import draw_cells
from bench.cpu import median
from bench.machine import processor
from cellpatch_fast.io.chunks.codecs_compiled import accumulate
from cellpatch_fast.io.stores.token_writer import CHUNK_ENTRIES

CHUNKS = (16_384, 32_768, 65_536, 131_072, 262_144)
RUN_CELLS = 64
RATES = ("encoded, million/s", "decoded, million/s", "decoded at best, million/s")
SHUFFLES = {  # and the bytes of an element: None for the array's own
    "none": (blosc.NOSHUFFLE, None),
    "bytes": (blosc.SHUFFLE, None),
    "bits": (blosc.BITSHUFFLE, None),
    "bits of pairs": (blosc.BITSHUFFLE, 2),
}


@dataclass(frozen=True)
class Codec:
    """A way to store one array.

    Parameters
    ----------
    array
        ``"genes"`` or ``"values"``.
    delta
        Whether differences are stored.
    compressor
        ``"lz4"`` or ``"zstd"`` within Blosc, ``"plain zstd"``, or ``"none"``.
    level
        Of the compressor.
    shuffle
        What Blosc sorts by first: nothing, bytes, bits, or the bits of two bytes together.
    """

    array: str
    delta: bool
    compressor: str
    level: int = 0
    shuffle: str = "none"

    def __str__(self) -> str:
        parts = ["delta"] if self.delta else []
        parts.append(f"{self.compressor} {self.level}" if self.level else self.compressor)
        return ", ".join(parts + ([self.shuffle] if self.shuffle != "none" else []))

    def encode(self, chunk: np.ndarray) -> bytes:
        if self.delta:
            chunk = Delta(chunk.dtype).encode(chunk)
        compressor = self._library()
        return chunk.tobytes() if compressor is None else compressor.encode(chunk)

    def decode(self, stored: bytes, out: np.ndarray) -> None:
        compressor = self._library()
        if compressor is None:
            out[:] = np.frombuffer(stored, out.dtype)
        else:
            compressor.decode(stored, out)
        if self.delta:
            accumulate(out)

    def _library(self) -> Any:
        if self.compressor == "none":
            return None
        if self.compressor == "plain zstd":
            return Zstd(self.level)
        shuffle, element = SHUFFLES[self.shuffle]
        return blosc.Blosc(self.compressor, self.level, shuffle, typesize=element)


CHOSEN = {
    "genes": Codec("genes", True, "lz4", 5, "bytes"),
    "values": Codec("values", False, "lz4", 5, "bits of pairs"),
}


def candidates(toy: bool) -> list[Codec]:
    """All codecs; with ``toy`` those that are chosen, and one of each kind."""
    ways = [("none", 0, "none"), *(("plain zstd", level, "none") for level in (1, 3))]
    for compressor, levels in (("lz4", (1, 5, 9)), ("zstd", (1, 3, 5))):
        ways += [(compressor, level, shuffle) for level in levels for shuffle in SHUFFLES]
    arrays = (("genes", False), ("genes", True), ("values", False))
    codecs = [Codec(array, delta, *way) for array, delta in arrays for way in ways]
    codecs = [c for c in codecs if c.array == "values" or c.shuffle != "bits of pairs"]  # the same
    if toy:
        codecs = [c for c in codecs if c.level < 2 and c.shuffle != "bytes"]
        codecs += CHOSEN.values()
    return codecs


def draw_entries(cells: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Offsets, genes and values of cells as the store holds them, median 1,500 genes.

    Values are those of counts (geometric, mean 2) after the paper's preprocessing.
    """
    offsets, tokens = draw_cells(cells, 1_500, rng)  # [c + 1], [n]
    counts = rng.geometric(0.5, len(tokens)).astype(np.float64)
    library = np.repeat(np.add.reduceat(counts, offsets[:-1]), np.diff(offsets))
    values = np.rint(np.log1p(counts * (1e4 / library))).clip(max=5)
    return {
        "offsets": offsets,
        "genes": tokens.astype(np.uint16),
        "values": values.astype(np.uint8),
    }


def read_entries(path: Path) -> dict[str, np.ndarray]:
    """The same of an AnnData file's cells, in the human vocabulary."""
    from cellpatch_fast import GeneVocabulary, pp

    cells = pp.tokenize(str(path), GeneVocabulary.human())
    return {name: getattr(cells, name).numpy() for name in ("offsets", "genes", "values")}


class Stored:
    """An array in chunks, encoded; what does not fill a chunk is left out."""

    def __init__(self, codec: Codec, numbers: np.ndarray, chunk: int, out: np.ndarray) -> None:
        self.codec, self.chunk = codec, chunk
        self.numbers = numbers = numbers[: len(numbers) // chunk * chunk]
        self.out = out[: len(numbers)]  # shared by all
        self.encode()
        self.decode()
        if not np.array_equal(self.out, numbers):
            raise AssertionError(f"{codec} in chunks of {chunk} does not give back what it got")

    @property
    def bytes_per_entry(self) -> float:
        return sum(map(len, self.chunks)) / len(self.numbers)

    def encode(self) -> None:
        self.chunks = [self.codec.encode(self.numbers[part]) for part in self._parts()]

    def decode(self) -> None:
        for stored, part in zip(self.chunks, self._parts(), strict=True):
            self.codec.decode(stored, self.out[part])

    def decode_runs(self, runs: np.ndarray) -> None:
        """Decode runs of entries, int64 [runs, 2]: whole chunks into place, the ends by copying."""
        scratch = np.empty(self.chunk, self.numbers.dtype)
        place = 0
        for start, stop in runs.tolist():
            out = self.out[place : place + stop - start]
            place += stop - start
            for index in range(start // self.chunk, -(-stop // self.chunk)):
                first, last = index * self.chunk, (index + 1) * self.chunk
                if start <= first and last <= stop:
                    self.codec.decode(self.chunks[index], out[first - start : last - start])
                    continue
                self.codec.decode(self.chunks[index], scratch)
                low, high = max(start, first), min(stop, last)
                out[low - start : high - start] = scratch[low - first : high - first]

    def _parts(self) -> Iterator[slice]:
        for start in range(0, len(self.numbers), self.chunk):
            yield slice(start, start + self.chunk)


def timed(*functions: Callable[[], None], repeats: int) -> list[list[float]]:
    """Processor seconds of each function, run in turn ``repeats`` times."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, taken in zip(functions, times, strict=True):
            started = time.thread_time()
            function()
            taken.append(time.thread_time() - started)
    return times


def measure_codecs(
    entries: dict[str, np.ndarray], chunks: tuple[int, ...], codecs: list[Codec], repeats: int
) -> list[dict[str, Any]]:
    """Bytes per entry, and million entries/s on one core, for every codec and chunk size."""
    out = {name: np.empty_like(numbers) for name, numbers in entries.items()}
    stored = [
        Stored(codec, entries[codec.array], chunk, out[codec.array])
        for chunk in chunks
        for codec in codecs
    ]
    work: list[Callable[[], None]] = [
        call for array in stored for call in (array.encode, array.decode)
    ]
    times = timed(*work, repeats=repeats)
    rows = []
    for array, encoding, decoding in zip(stored, times[::2], times[1::2], strict=True):
        million = len(array.numbers) / 1e6
        rows.append(
            {
                **asdict(array.codec),
                "chunk": array.chunk,
                "bytes per entry": array.bytes_per_entry,
                "encoded, million/s": million / median(encoding),
                "decoded, million/s": million / median(decoding),
                "decoded at best, million/s": million / min(decoding),
            }
        )
    return rows


def measure_runs(
    entries: dict[str, np.ndarray], chunks: tuple[int, ...], repeats: int, rng: np.random.Generator
) -> list[dict[str, float]]:
    """Time for cells in random runs of 64 against the same cells in order, by chunk size."""
    offsets = entries["offsets"]
    offsets = offsets[offsets <= offsets[-1] // max(chunks) * max(chunks)]  # cells in full chunks
    bounds = offsets[::RUN_CELLS]
    runs = rng.permutation(np.stack([bounds[:-1], bounds[1:]], 1))  # [runs, 2]
    out = {name: np.empty_like(numbers) for name, numbers in entries.items()}
    stored = [
        [Stored(codec, entries[name], chunk, out[name]) for name, codec in CHOSEN.items()]
        for chunk in chunks
    ]

    def decode_all(arrays: list[Stored]) -> None:
        for array in arrays:
            array.decode()

    def decode_runs(arrays: list[Stored]) -> None:
        for array in arrays:
            array.decode_runs(runs)

    work = [partial(f, arrays) for arrays in stored for f in (decode_all, decode_runs)]
    times = timed(*work, repeats=repeats)
    rows = []
    for arrays, ordered, random in zip(stored, times[::2], times[1::2], strict=True):
        chunk, in_order = arrays[0].chunk, len(arrays[0].numbers) / 1e6
        at_random = bounds[-1] / 1e6
        decoded = -(-runs[:, 1] // chunk) - runs[:, 0] // chunk  # chunks
        rows.append(
            {
                "chunk": chunk,
                "in order, million/s": in_order / median(ordered),
                "random runs, million/s": at_random / median(random),
                "entries decoded per entry wanted": decoded.sum() * chunk / bounds[-1],
                "times the time in order": median(random) / median(ordered) * in_order / at_random,
                "at best": min(random) / min(ordered) * in_order / at_random,
            }
        )
    return rows


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    chunk = results["chunk"]
    lines = [f"{results['machine']}, one core, {results['date']}"]
    for name in ("generated", "real"):
        for array in ("genes", "values") if name in results else ():
            lines += [
                "",
                f"| {array}, {name}, chunks of {chunk:,} | bytes | encoded, M/s | decoded, M/s | "
                "at best |",
                "| --- | ---: | ---: | ---: | ---: |",
            ]
            for row in results[name]:
                if (row["array"], row["chunk"]) == (array, chunk):
                    codec = Codec(*(row[field.name] for field in fields(Codec)))
                    shown = f"**{codec}**" if codec in CHOSEN.values() else str(codec)
                    lines.append(f"| {shown} | {' | '.join(rates(row))} |")
    lines += ["", "| chosen codecs, by chunk | bytes | encoded, M/s | decoded, M/s | at best |"]
    lines += ["| ---: | ---: | ---: | ---: | ---: |"]
    for chunk in dict.fromkeys(row["chunk"] for row in results["generated"]):
        of_chunk = [row for row in results["generated"] if row["chunk"] == chunk]
        both = [
            row
            for row in of_chunk
            if any(asdict(codec).items() <= row.items() for codec in CHOSEN.values())
        ]
        together = {name: 1 / sum(1 / row[name] for row in both) for name in RATES}
        together["bytes per entry"] = sum(row["bytes per entry"] for row in both)
        lines.append(f"| {chunk:,} | {' | '.join(rates(together))} |")
    lines += ["", f"| {' | '.join(results['runs'][0])} |", "| ---: " * 6 + "|"]
    for row in results["runs"]:
        chunk, ordered, random, *ratios = row.values()
        numbers = [f"{chunk:,}", f"{ordered:.0f}", f"{random:.0f}", *(f"{x:.2f}" for x in ratios)]
        lines.append(f"| {' | '.join(numbers)} |")
    return "\n".join(lines)


def rates(row: dict[str, Any]) -> list[str]:
    return [f"{row['bytes per entry']:.3f}", *(f"{row[name]:.0f}" for name in RATES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="few cells and codecs: does it run?")
    parser.add_argument("--cells", type=int, default=1_280)
    parser.add_argument("--data", type=Path, help="an AnnData file to take real cells from")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    cells, repeats = (200, 1) if options.toy else (options.cells, options.repeats)
    chunks = (CHUNK_ENTRIES // 4, CHUNK_ENTRIES) if options.toy else CHUNKS
    blosc.use_threads = False  # one core
    rng = np.random.default_rng(0)
    codecs = candidates(options.toy)
    entries = draw_entries(cells, rng)
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": processor(),
        "chunk": CHUNK_ENTRIES,
        "entries": len(entries["genes"]),
        "generated": measure_codecs(entries, chunks, codecs, repeats),
        "runs": measure_runs(entries, chunks, repeats, rng),
    }
    if options.data:
        real = read_entries(options.data)
        results["real"] = measure_codecs(real, (CHUNK_ENTRIES,), codecs, repeats)
    print(report(results))
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
