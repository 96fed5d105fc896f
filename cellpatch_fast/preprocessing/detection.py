"""What a matrix holds: raw counts, normalised values or logarithms, or nothing usable.

The model was trained on log1p of counts per ten thousand. Logging a matrix twice, or not at
all, gives embeddings that look fine and mean nothing, so the kind of a matrix is inferred from
its values before anything is computed (`scales` says how), a wrong expectation is refused, and
the reason of each decision is one line for the log.

What is done about each scale:

- Raw counts, estimated and corrected ones too, and normalised values are taken: normalising once
  more only changes the common library size.
- Natural logarithms of normalised counts are taken; with a warning if the library size was not
  the model's, or if nothing but their size tells that they are logarithms.
- Natural logarithms of counts that were not normalised are refused, unless the user says
  ``lognorm``: then there is a warning.
- Other logarithms, logarithms of logarithms and square roots are refused.
- Values that were scaled to one standard deviation are refused, unless the user says otherwise.
- Cells that do not all hold the same are refused, unless the user says what they hold: then there
  is a warning, and all are taken as that. See `changes` for the cells that are read later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..config import Expected
from ..errors import InputError, InputWarning, warn
from .blocks import invalid_entry, readable_block
from .parts import (
    ELSEWHERE,
    USABLE,
    Part,
    highest_values,
    look_at_parts,
    remedy_of_mixture,
    where,
)
from .scales import LARGEST_LOGARITHM, NATURAL, VALUES, Look, look_at

if TYPE_CHECKING:
    from ..cells import CellBlock

__all__ = ["Detected", "InputKind", "InputKindWarning", "detect_input"]

InputKind = Literal["counts", "normalized", "lognorm"]


class InputKindWarning(InputWarning):
    """A matrix is usable, but not quite what the model expects."""


@dataclass(frozen=True)
class Detected:
    """The kind of a matrix, and in one line how it shows.

    Parameters
    ----------
    kind
        ``"counts"`` (integers, or counts with fractions), ``"normalized"`` (scaled to one library
        size, not logged: handled exactly as counts) or ``"lognorm"`` (logged already: clip and
        round only).
    reason
        What was seen, for people.
    look
        What was seen.
    low_highest
        5 % of the cells looked at have no value above it.
    requested
        Whether the user said what the matrix holds.
    """

    kind: InputKind
    reason: str
    look: Look
    low_highest: float = 0.0
    requested: bool = False

    @property
    def sums_matter(self) -> bool:
        """Whether values depend on which genes there were when they were added up."""
        return self.look.evidence in ("integers", "whole", "library") and not self.requested


def detect_input(
    sample: CellBlock,
    name: str,
    expected: Expected = "auto",
    *,
    target_sum: float = 1e4,
    gene_names: Sequence[str] | None = None,
    n_cells: int | None = None,
) -> Detected:
    """Tell raw counts, normalised values and log-normalised values apart.

    Parameters
    ----------
    sample
        Cells from all over the matrix; a thousand are plenty.
    name
        What to call the matrix in messages (its file).
    expected
        What the user says it holds: ``"counts"`` (raw), ``"lognorm"`` (natural log1p of
        normalised counts), or ``"auto"``, which takes whatever is found.
    target_sum
        The library size that the model expects.
    gene_names
        Names of the columns, for messages.
    n_cells
        Cells of the matrix; by default those of the sample.

    Raises
    ------
    InputError
        If values are negative, not a number or infinite, are on a scale that is no use to the
        model, contradict ``expected``, or the cells do not all hold the same.

    Warns
    -----
    InputKindWarning
        If log-normalised cells have a library size more than 1 % off ``target_sum``, or what they
        hold is doubtful.
    """
    if expected not in ("auto", "counts", "lognorm"):
        raise ValueError(f"input must be auto, counts or lognorm, found {expected!r}")
    sample = readable_block(sample, name)
    wrong = np.flatnonzero(~((sample.data >= 0) & (sample.data < np.inf)))
    if len(wrong):
        raise invalid_entry(sample, int(wrong[0]), name, gene_names)

    parts = look_at_parts(sample)
    if len({part.holds for part in parts}) > 1:
        _refuse_mixture(parts, name, expected)
        requested: InputKind = "counts" if expected == "counts" else "lognorm"
        reason = f"cells that do not all hold the same: taken as {expected}, as requested"
        return Detected(requested, reason, look_at(sample), requested=True)
    look = look_at(sample)
    largest = max(parts, key=lambda part: len(part.cells), default=None)
    if largest and largest.look.certain and look.scale is not largest.look.scale:
        look = largest.look  # together they show less than by themselves
    seen = ""
    if n_cells is not None and n_cells > len(sample):
        seen = f" (seen in {len(sample):,} of {n_cells:,} cells)"
    if look.certain and look.scale not in USABLE:
        raise InputError(
            f"{name}: found {look.reason}{seen}, but the model needs natural logarithms of "
            f"normalised counts, or counts. {ELSEWHERE}, or undo the transformation: "
            f"{look.scale.undoing}."
        )
    if look.scaled and expected == "auto":
        raise InputError(
            f"{name}: found {look.reason}{seen}, which are no use to the model. {ELSEWHERE}. To "
            'use them all the same, set input (--values) to "counts" or "lognorm".'
        )
    kind = _decide(look, f"{look.reason}{seen}", name, expected)
    reason = look.reason
    if expected == "lognorm" and not look.normalized:
        reason += "; taken as logarithms, as requested"
    if kind == "lognorm":
        _warn_of_logarithms(look, [part.look for part in parts], name, expected, target_sum)
    low_highest = float(np.quantile(highest_values(sample), 0.05))
    return Detected(kind, f"{reason}{seen}", look, low_highest, requested=expected != "auto")


def warn_of_selection(detected: Detected, name: str, n_genes: int, shown: str) -> None:
    """Warn that the genes of a matrix are a selection, which is ``shown`` by something."""
    warn(
        f"{name}: its {n_genes:,} genes are a selection of those that were measured: {shown}. "
        "Normalised to the sum of these genes, values are larger than the model expects. Read all "
        "genes (layer, use_raw, or the matrix before genes were selected), or set input (--values) "
        f'to "{"lognorm" if detected.kind == "lognorm" else "counts"}" if they are all there were.',
        InputKindWarning,
    )


def _decide(look: Look, found: str, name: str, expected: Expected) -> InputKind:
    """What values or natural logarithms are taken as."""
    unlogged = look.scale is VALUES
    if expected == "lognorm":
        if unlogged and (look.normalized or look.highest > LARGEST_LOGARITHM):
            raise InputError(
                f"{name}: log-normalised values were expected, but found {found}. Set input "
                '(--values) to "auto", which normalises and logs them, or choose the '
                "log-normalised matrix with layer or use_raw."
            )
        return "lognorm"
    if expected == "counts" and look.certain and (look.normalized or not unlogged):
        raise InputError(
            f"{name}: raw counts were expected, but found {found}. {ELSEWHERE}, or set input "
            '(--values) to "auto" to use the matrix as what it is.'
        )
    if expected == "counts":
        if not unlogged:
            warn(
                f"{name}: found {found}; taken as counts, as requested.",
                InputKindWarning,
            )
        return "counts"
    if unlogged:
        return "normalized" if look.normalized else "counts"
    if look.evidence == "whole":
        raise InputError(
            f"{name}: found {found}, but the model needs logarithms of normalised counts, or "
            f"counts. {ELSEWHERE}, or undo the logarithm: {look.scale.undoing}. To use the "
            'logarithms as they are, set input (--values) to "lognorm".'
        )
    return "lognorm"


def _warn_of_logarithms(
    look: Look, parts: Sequence[Look], name: str, expected: Expected, target_sum: float
) -> None:
    """Warn if logarithms are not quite what the model expects."""
    advice = f"{ELSEWHERE}: they would be normalised to that."
    if look.evidence == "whole" and look.scale is NATURAL:
        warn(
            f"{name}: the logarithms are of raw counts, but the model expects them normalised "
            f"to {target_sum:,.7g}. {advice}",
            InputKindWarning,
        )
    for part in (look, *parts):
        size, exact = part.high_library, part.evidence == "library"
        more, less = size > 1.01 * target_sum, size < 0.99 * target_sum
        if part.scale is NATURAL and part.normalized and (more or (exact and less)):
            at_least = "" if exact else "at least "
            warn(
                f"{name}: the cells were normalised to a library size of {at_least}{size:,.7g}, "
                f"but the model expects {target_sum:,.7g}. {advice}",
                InputKindWarning,
            )
            break
    # of some genes of cells that were normalised to it
    low, high = look.low_library / target_sum, look.high_library / target_sum
    plausible = low > 0.15 * high and 0.5 < high < 1.01
    if expected == "auto" and look.evidence == "size" and not plausible:
        warn(
            f"{name}: found {look.reason}, but nothing else shows that they are logarithms of "
            'normalised counts. Set input (--values) to "lognorm" if they are, to "counts" if they '
            "are counts with fractions (corrected ones, for example); values that were integrated "
            f"are no use. {ELSEWHERE} if there are any.",
            InputKindWarning,
        )


def _refuse_mixture(parts: Sequence[Part], name: str, expected: Expected) -> None:
    """Say which cells hold what: as an error, or a warning if the user has said what they hold."""
    kinds = {part.holds: part.look.reason for part in parts}  # the last part of each speaks for it
    holdings = "; ".join(f"{reason} in {where(parts, holds)}" for holds, reason in kinds.items())
    message = f"{name}: not all cells hold the same: found {holdings}, of those looked at."
    looks = [part.look for part in parts]
    if expected == "auto" or not all(look.scale in USABLE for look in looks):
        raise InputError(f"{message} {remedy_of_mixture(looks)}")
    warn(f"{message} All are taken as {expected}, as requested.", InputKindWarning)
