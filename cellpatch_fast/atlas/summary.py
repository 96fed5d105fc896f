"""What a run over files did, and what it left out: nothing is dropped silently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from ..loading.inputs import Stream

GENES = ("genes_matched", "genes_unknown", "genes_duplicated", "genes_ambiguous")


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Parameters
    ----------
    output
        The finished store.
    cells
        Cells in it; ``computed`` of them were read by this run, the others by an earlier,
        interrupted one (or all, where the store was finished already).
    genes_matched, genes_unknown
        Genes of the inputs that the vocabulary has and lacks, summed over inputs.
    genes_duplicated
        Of those matched, how many share their token with another gene of the same input.
    genes_ambiguous
        Of those matched, how many have a symbol of several genes: they were taken for the first.
    entries
        Non-zero entries of all cells together, of known genes.
    unknown_entries
        Non-zero entries dropped because of unknown genes.
    empty_cells
        Cells without any known gene.
    seconds
        From the first cell read to the last one written.
    """

    output: Path
    cells: int
    computed: int = 0
    genes_matched: int = 0
    genes_unknown: int = 0
    genes_duplicated: int = 0
    genes_ambiguous: int = 0
    entries: int = 0
    unknown_entries: int = 0
    empty_cells: int = 0
    seconds: float = 0.0

    def counted(self, counts: Mapping[str, int]) -> Self:
        """The same with the counts of a finished store."""
        return replace(
            self,
            entries=counts["entries"],
            unknown_entries=counts["unknown_entries"],
            empty_cells=counts["empty_cells"],
        )

    def __str__(self) -> str:
        if not self.seconds:
            return f"{self.output} is complete already: {self.cells:,} cells, nothing to do"
        earlier = self.cells - self.computed
        resumed = f" ({earlier:,} of them earlier)" if earlier else ""
        unsure = "".join(
            f", {count:,} {kind}"
            for kind, count in (
                ("duplicated", self.genes_duplicated),
                ("ambiguous", self.genes_ambiguous),
            )
            if count
        )
        speed = f", {self.computed / self.seconds:,.0f} cells/s" if self.computed else ""
        return (
            f"{self.output}: {self.cells:,} cells{resumed}, {self.entries:,} entries, "
            f"{self.genes_matched:,} genes matched, {self.genes_unknown:,} unknown{unsure}, "
            f"{self.empty_cells:,} empty cells{speed}"
        )


def gene_counts(streams: Sequence[Stream]) -> dict[str, int]:
    """What became of the genes, summed over inputs."""
    return {name: sum(getattr(stream, name) for stream in streams) for name in GENES}
