"""The compiled part of `masking`: one pass over the cells, without the GIL.

Small loops over one cell, without branches that cannot be foreseen: an entry is written to both
sides of a decision, and only the side that it belongs to moves on. Random numbers come from a key
and a counter, so there is no state to carry along; each decision about a cell has its counters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .ordering import sort_by_digit

__all__ = ["hash_integer", "mask_cells"]

ONE = np.uint64(1)
WORD_BITS = 64  # of a bitmap's word
UNIT = 2.0**-53


@njit(nogil=True, cache=True)
def mask_cells(
    offsets: Any,  # [c + 1]
    genes: Any,  # [n]
    values: Any,  # [n]
    identities: Any,  # [c]
    inputs: Any,  # [c]
    tokens: Any,  # of all inputs
    starts: Any,  # [i + 1]
    vocabulary_size: int,
    hidden_share: float,
    zeros_share: float,
    max_encoder: int,
    max_decoder: int,
    digit: int,  # bits, see `ordering`
    run: Any,  # hash of seed and epoch
    encoder: Any,  # offsets, genes, values; to be written
    decoder: Any,  # likewise
    counts: Any,  # see MaskCounts
) -> int:
    """Mask all cells; the first one that is refused, or -1.

    Prompts are what the decoder is asked: hidden genes, then zeros, sorted at last.
    """
    longest = 0
    for cell in range(len(offsets) - 1):
        longest = max(longest, offsets[cell + 1] - offsets[cell])
    room = longest + int(min(zeros_share * longest + 0.5, float(vocabulary_size)))
    prompt_genes, prompt_values = np.empty(room, genes.dtype), np.empty(room, values.dtype)
    half_genes, half_values = np.empty(room, genes.dtype), np.empty(room, values.dtype)
    places = np.empty(1 << digit, np.uint32)
    taken = np.empty(vocabulary_size // WORD_BITS + 1, np.uint64)  # a bit for each token

    for cell in range(len(offsets) - 1):
        entries = slice(offsets[cell], offsets[cell + 1])
        cell_genes, cell_values = genes[entries], values[entries]
        distinct = _count_genes(cell_genes, vocabulary_size)
        if distinct < 0 or not 0 <= inputs[cell] < len(starts) - 1:
            return cell
        key = hash_integer(run ^ identities[cell])
        step = len(cell_genes)  # random numbers kept for each of the decisions below

        hide = 0
        if distinct > 1:
            hide = min(max(int(hidden_share * distinct + 0.5), 1), distinct - 1)
        seen_genes = encoder.genes[encoder.offsets[cell] :]
        seen_values = encoder.values[encoder.offsets[cell] :]
        hidden = _hide(
            cell_genes, cell_values, distinct, hide, key,
            seen_genes, seen_values, prompt_genes, prompt_values,
        )  # fmt: skip
        unhidden = len(cell_genes) - hidden
        seen = _thin(seen_genes, seen_values, unhidden, max_encoder, key, step)
        encoder.offsets[cell + 1] = encoder.offsets[cell] + seen

        predicted, wanted = hidden, np.floor(zeros_share * hidden + 0.5)
        if hidden + wanted > max_decoder:
            predicted = max(int(max_decoder / (1 + zeros_share) + 0.5), 1)
            wanted = max_decoder - predicted
        _thin(prompt_genes, prompt_values, hidden, predicted, key, 2 * step)
        measured = tokens[starts[inputs[cell]] : starts[inputs[cell] + 1]]
        end = predicted + int(min(wanted, len(measured)))
        drawn = prompt_genes[predicted:end]
        prompt_values[predicted:end] = 0
        zeros = _draw_zeros(cell_genes, measured, key, 3 * step, taken, drawn)

        begin, length = decoder.offsets[cell], predicted + zeros
        half = half_genes[:length], half_values[:length]
        to = decoder.genes[begin : begin + length], decoder.values[begin : begin + length]
        sort_by_digit(prompt_genes[:length], prompt_values[:length], *half, places, 0)
        sort_by_digit(*half, *to, places, digit)
        decoder.offsets[cell + 1] = begin + length

        counts[0] += hidden
        counts[1] += unhidden - seen
        counts[2] += hidden - predicted
        counts[3] += zeros
        counts[4] += wanted - zeros
        counts[5] += distinct < 2
    return -1


@njit(nogil=True, cache=True)
def _count_genes(genes: Any, vocabulary_size: int) -> int:
    """How many genes ordered entries have; -1 if they are not ordered or a token is too large."""
    if len(genes) == 0:
        return 0
    changes, falls = 0, 0
    for entry in range(1, len(genes)):
        changes += genes[entry] != genes[entry - 1]
        falls += genes[entry] < genes[entry - 1]
    if falls or np.uint64(genes[len(genes) - 1]) >= np.uint64(vocabulary_size):
        return -1
    return changes + 1


@njit(nogil=True, cache=True)
def _hide(
    genes: Any,
    values: Any,
    distinct: int,
    hide: int,
    key: Any,
    seen_genes: Any,
    seen_values: Any,
    hidden_genes: Any,
    hidden_values: Any,
) -> int:
    """Divide a cell's entries so that ``hide`` of its genes are hidden; how many entries are.

    Selection sampling: of the genes that are left, the next one is hidden with the share that has
    yet to be hidden.
    """
    seen, hidden, hides = 0, 0, 0
    for entry in range(len(genes)):
        if entry == 0 or genes[entry] != genes[entry - 1]:
            hides = int(_below(key, entry, distinct) < hide)
            distinct -= 1
            hide -= hides
        seen_genes[seen] = hidden_genes[hidden] = genes[entry]
        seen_values[seen] = hidden_values[hidden] = values[entry]
        hidden += hides
        seen += 1 - hides
    return hidden


@njit(nogil=True, cache=True)
def _thin(genes: Any, values: Any, length: int, most: int, key: Any, counter: int) -> int:
    """Keep ``most`` of the first ``length`` entries, in place and in order; how many are left."""
    if length <= most:
        return length
    kept = 0
    for entry in range(length):
        genes[kept], values[kept] = genes[entry], values[entry]
        kept += _below(key, counter + entry, length - entry) < most - kept
    return most


@njit(nogil=True, cache=True)
def _draw_zeros(genes: Any, measured: Any, key: Any, counter: int, taken: Any, drawn: Any) -> int:
    """Fill ``drawn`` with measured tokens that are no gene's, each once; how many there were.

    Rejection gives up after so many draws that it hardly ever does. Which tokens it has found by
    then is as random as before, so the exact method may add what is missing.
    """
    if len(drawn) == 0:
        return 0
    taken[:] = 0
    for entry in range(len(genes)):
        _mark(taken, genes[entry])
    number, last = 0, counter
    if 2 * (len(genes) + len(drawn)) <= len(measured):
        last += 4 * len(drawn) + 64
    while number < len(drawn) and counter < last:
        token = measured[_below(key, counter, len(measured))]
        counter += 1
        if not _is_marked(taken, token):
            _mark(taken, token)
            drawn[number] = token
            number += 1
    if number == len(drawn):
        return number

    left = 0
    for token in measured:
        left += not _is_marked(taken, token)
    for token in measured:
        if number < len(drawn) and not _is_marked(taken, token):
            if _below(key, counter, left) < len(drawn) - number:
                drawn[number] = token
                number += 1
            counter += 1
            left -= 1
    return number


@njit(nogil=True, cache=True)
def hash_integer(number: Any) -> Any:
    """The finaliser of SplitMix64: uint64 to uint64, one to one."""
    number += np.uint64(0x9E3779B97F4A7C15)
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))


@njit(nogil=True, cache=True)
def _below(key: Any, counter: int, bound: int) -> int:
    """A random integer from 0 to ``bound`` - 1: the ``counter``-th of a cell's key."""
    number = hash_integer(key + np.uint64(counter) * np.uint64(0x9E3779B97F4A7C15))
    return int(np.int64(number >> np.uint64(11)) * UNIT * bound)


@njit(nogil=True, cache=True)
def _mark(bits: Any, token: int) -> None:
    bits[token // WORD_BITS] |= ONE << np.uint64(token % WORD_BITS)


@njit(nogil=True, cache=True)
def _is_marked(bits: Any, token: int) -> bool:
    return (bits[token // WORD_BITS] >> np.uint64(token % WORD_BITS)) & ONE != 0
