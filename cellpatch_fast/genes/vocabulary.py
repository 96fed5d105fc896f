"""GeneVocabulary: which gene has which token, and how the names in a file find their genes.

A model knows genes as tokens: rows of its embedding. Data name them by Ensembl ID, by symbol, or
by a mixture of both with versions and suffixes. The decisions made here:

- A gene has an Ensembl ID, a symbol, or both. Tokens start at 1; token 0 is padding.
- The Ensembl ID decides where a name contains one. ``ENSG00000167286``, ``ENSG00000167286.14``
  and ``CD3D_ENSG00000167286`` are one gene, and so is a ``…_PAR_Y`` copy: the same gene, annotated
  a second time on the Y chromosome. Any other name is a symbol and must match letter for letter:
  no synonyms, no upper-casing, no guessing.
- A symbol that several genes share stands for the first of them, by token (in the human reference
  by position on the genome), and is always reported as ambiguous.
- Two names of one gene (a duplicate) both keep its token, and both are reported.
- A vocabulary never changes: `GeneVocabulary.add` makes a new one, in which all old tokens stand.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, InputWarning, warn
from ..files import write_whole
from .names import first_names, human_genes, original_names, split_name, var_columns, var_names

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "cellpatch vocabulary"
FORMAT_VERSION = 1
UNKNOWN = -1
LARGEST_TOKEN = 2**31 - 1  # tokens are int32


class GeneMatchWarning(InputWarning):
    """Fewer than half of the genes of a file are in the vocabulary."""


@dataclass(frozen=True, eq=False)
class GeneMatch:
    """What became of the gene names of a file.

    Parameters
    ----------
    tokens
        int32 [names]: the gene token of each name, -1 where the vocabulary lacks it.
    matched
        Number of names that have a token.
    unknown
        The names that have none.
    duplicated
        The names that share their token with another name of the file.
    ambiguous
        The names that are symbols of several genes; their token is the first one's.
    source
        Where the names were found, for messages.
    """

    tokens: np.ndarray  # [names]
    matched: int
    unknown: list[str]
    duplicated: list[str]
    ambiguous: list[str]
    source: str = "names"

    def __str__(self) -> str:
        counts = {kind: len(getattr(self, kind)) for kind in ("unknown", "duplicated", "ambiguous")}
        rest = "".join(f", {count:,} {kind}" for kind, count in counts.items() if count)
        return f"{self.matched:,} of {len(self.tokens):,} genes matched by {self.source}{rest}"


class GeneVocabulary:
    """The genes that a model knows, each with its token.

    Parameters
    ----------
    ensembl_ids, symbols
        One element per gene, empty where a gene has no such name. Ensembl IDs have no version
        and occur once; a gene without Ensembl ID is the only such gene of its symbol.
    tokens
        int [genes], from 1, each once. None: 1, 2, 3, …

    Raises
    ------
    ValueError
        If names or tokens break these rules.

    Examples
    --------
    >>> vocabulary = GeneVocabulary.human()
    >>> vocabulary.match(["CD3D", "ENSG00000156738.18", "not a gene"]).unknown
    ['not a gene']
    """

    def __init__(
        self,
        ensembl_ids: Sequence[str],
        symbols: Sequence[str],
        tokens: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        if tokens is None:
            tokens = np.arange(1, len(symbols) + 1)
        elif outside := [token for token in tokens if not 1 <= token <= LARGEST_TOKEN]:
            raise ValueError(f"token {outside[0]} is not between 1 and {LARGEST_TOKEN}")
        if not len(ensembl_ids) == len(symbols) == len(tokens):
            raise ValueError(
                f"{len(ensembl_ids)} Ensembl IDs, {len(symbols)} symbols and {len(tokens)} "
                "tokens do not describe the same genes"
            )
        order = np.argsort(tokens)
        self.tokens = np.asarray(tokens, np.int32)[order]  # [genes], increasing
        self.tokens.flags.writeable = False
        self.ensembl_ids = tuple(np.asarray(ensembl_ids, object)[order])
        self.symbols = tuple(np.asarray(symbols, object)[order])
        genes = zip(self.ensembl_ids, self.symbols, strict=True)
        alone = [symbol for ensembl_id, symbol in genes if not ensembl_id]
        if "" in alone:
            raise ValueError("a gene has neither an Ensembl ID nor a symbol")
        if versioned := [name for name in self.ensembl_ids if "." in name]:
            raise ValueError(f"Ensembl ID {versioned[0]} has a version, which none may have")
        _refuse_repeats("token", self.tokens.tolist())
        _refuse_repeats("Ensembl ID", [name for name in self.ensembl_ids if name])
        _refuse_repeats("gene without Ensembl ID", alone)

    def __len__(self) -> int:
        """The number of genes."""
        return len(self.symbols)

    @property
    def size(self) -> int:
        """Rows that an embedding of these genes needs: the highest token plus one."""
        return int(self.tokens[-1]) + 1 if len(self) else 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all tokens and names: the same for the same genes, however stored."""
        return hashlib.sha256(json.dumps(self._rows()).encode("ascii")).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GeneVocabulary) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        if not len(self):
            return "<GeneVocabulary: no genes>"
        return (
            f"<GeneVocabulary: {len(self):,} genes, tokens {self.tokens[0]:,} to "
            f"{self.tokens[-1]:,}: {self._examples()}"
            f"{', …' if len(self) > 3 else ''}; fingerprint {self.fingerprint[:12]}>"
        )

    @classmethod
    @cache
    def human(cls) -> GeneVocabulary:
        """The bundled human reference: 60,664 genes (GENCODE v38), tokens in its order."""
        genes = human_genes()
        return cls(genes.ensembl_ids, genes.symbols)

    @classmethod
    def load(cls, path: str | Path) -> GeneVocabulary:
        """Read a ``vocabulary.json`` that `save` wrote.

        Raises
        ------
        InputError
            If the file is missing, is not a vocabulary, is damaged, or is from a newer version.
        """
        content = _read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(
                f"{path}: not a cellpatch-fast vocabulary. If it is a gene2tok.json of the "
                "original code, read it with GeneVocabulary.from_original"
            )
        version, rows = content.get("format_version"), content.get("genes")
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise InputError(
                f"{path}: vocabulary format version {version!r} is not supported (this package "
                f"reads up to {FORMAT_VERSION}): install a newer cellpatch-fast"
            )
        if not isinstance(rows, list):
            raise InputError(f"{path}: the list of genes is missing; save the vocabulary again")
        for number, row in enumerate(rows):
            if not isinstance(row, list) or [type(field) for field in row] != [int, str, str]:
                raise InputError(
                    f"{path}: gene {number} is {json.dumps(row)[:80]}, expected "
                    "[token, Ensembl ID, symbol]; save the vocabulary again"
                )
        tokens, ensembl_ids, symbols = zip(*rows, strict=True) if rows else ((), (), ())
        try:
            return cls(ensembl_ids, symbols, tokens)
        except ValueError as error:
            raise InputError(f"{path}: {error}; save the vocabulary again") from None

    @classmethod
    def from_original(cls, path: str | Path) -> GeneVocabulary:
        """Read a ``gene2tok.json`` of the original code: ``{name: token}``, tokens from 1.

        Names are ``SYMBOL``, ``SYMBOL_ENSG…`` or ``ENSG….version``, and each of them finds its
        own token again. A plain symbol gets its Ensembl ID from the human reference if exactly
        one gene has that symbol, there and in the file, so that data with Ensembl IDs work too.

        Raises
        ------
        InputError
            If the file is missing, is not such a dict, repeats a name or a token, or is empty.
        """
        token_of = _read_json(path)
        expected = "a gene2tok.json of the original code maps gene names to whole numbers from 1"
        if not isinstance(token_of, dict) or not token_of:
            raise InputError(f"{path}: no dict, or an empty one; {expected}")
        for name, token in token_of.items():
            if type(token) is not int or not name:
                raise InputError(f"{path}: {name!r} has {json.dumps(token)[:80]}; {expected}")
        try:
            ensembl_ids, symbols = original_names(list(token_of))
            return cls(ensembl_ids, symbols, list(token_of.values()))
        except ValueError as error:
            raise InputError(f"{path}: {error}; {expected}, each its own") from None

    def add(self, names: Iterable[str], max_genes: int = 70_000) -> GeneVocabulary:
        """A vocabulary that knows ``names`` too: unknown ones get the next tokens, in order.

        Parameters
        ----------
        names
            Gene names of any kind; those that are known already change nothing.
        max_genes
            Rows of the model's gene embedding, which `size` must not exceed.

        Raises
        ------
        InputError
            If the genes do not fit, or a name is empty.
        """
        new: dict[str, tuple[str, str]] = {}
        for name in self.match(list(names)).unknown:
            if not name.strip():
                raise InputError("a gene name is empty: drop that gene, or give it a name")
            ensembl_id, symbol = split_name(name)
            new.setdefault(ensembl_id or symbol, (ensembl_id, symbol))
        if self.size + len(new) > max_genes:
            raise InputError(
                f"{len(new):,} genes ({first_names(list(new))}) are new to a vocabulary with room "
                f"for {max(max_genes - self.size, 0):,} (max_genes = {max_genes:,}): leave genes "
                "out, or make a model with a larger max_genes"
            )
        return GeneVocabulary(
            self.ensembl_ids + tuple(ensembl_id for ensembl_id, _ in new.values()),
            self.symbols + tuple(symbol for _, symbol in new.values()),
            [*self.tokens.tolist(), *range(self.size, self.size + len(new))],
        )

    def save(self, path: str | Path) -> None:
        """Write ``vocabulary.json``, one gene a line; a crash leaves the old file or the new."""
        write_whole(path, self._file)

    @cached_property
    def _file(self) -> bytes:
        """What `save` writes, made once: training saves its model after every epoch."""
        head = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION})[:-1]
        genes = ",\n".join(map(json.dumps, self._rows()))
        return f'{head}, "genes": [\n{genes}\n]}}\n'.encode("ascii")

    def match(self, names: Sequence[str]) -> GeneMatch:
        """Find the token of every name; the rules are at the head of this file."""
        names = list(map(str, names))
        by_symbol, by_id = self._by_symbol, self._by_ensembl_id  # no token is 0
        tokens = np.fromiter(
            (
                by_symbol.get(name) or by_id.get(name) or by_id.get(split_name(name)[0], UNKNOWN)
                for name in names
            ),
            np.int32,
            len(names),
        )
        matched = tokens != UNKNOWN
        _, inverse, counts = np.unique(tokens, return_inverse=True, return_counts=True)
        repeated = matched & (counts[inverse] > 1)
        return GeneMatch(
            tokens=tokens,
            matched=int(matched.sum()),
            unknown=[names[gene] for gene in np.flatnonzero(~matched)],
            duplicated=[names[gene] for gene in np.flatnonzero(repeated)],
            ambiguous=[name for name in names if name in self._shared_symbols],
        )

    def match_var(
        self, var: pd.DataFrame, gene_column: str | None = None, path: str | Path = "AnnData object"
    ) -> GeneMatch:
        """Find the tokens of the genes of an AnnData file.

        Parameters
        ----------
        var
            The file's gene table, [genes, columns].
        gene_column
            Its column with gene names, or ``"index"``. None: the index or usual column
            (`gene_names.GENE_COLUMNS`) with most matches, then fewest ambiguous, duplicated names.
        path
            The file's name, for messages.

        Raises
        ------
        InputError
            If the column does not exist, there are no genes, or no gene matches.

        Warns
        -----
        GeneMatchWarning
            If fewer than half of the genes match.
        """
        offered = var_names(var, gene_column, path)
        matches = [replace(self.match(names), source=place) for place, names in offered.items()]
        best = max(matches, key=lambda m: (m.matched, -len(m.ambiguous), -len(m.duplicated)))
        if not best.matched:
            listed = "; ".join(
                f"by {place}: {first_names(names)}" for place, names in offered.items()
            )
            raise InputError(
                f"{path}: none of its {len(var):,} genes is in the vocabulary. The file has "
                f"{listed}; the vocabulary has {self._examples()}. Choose where the "
                f"Ensembl IDs or symbols are (gene_column, --gene-column): {var_columns(var)}"
            )
        if 2 * best.matched < len(best.tokens):
            warn(
                f"{path}: only {best}. Unknown genes are left out: {first_names(best.unknown)}. "
                "Is this the right species, and are these Ensembl IDs or current symbols?",
                GeneMatchWarning,
            )
        return best

    @cached_property
    def _by_ensembl_id(self) -> dict[str, int]:
        tokens = dict(zip(self.ensembl_ids, self.tokens.tolist(), strict=True))
        tokens.pop("", None)
        return tokens

    @cached_property
    def _by_symbol(self) -> dict[str, int]:
        """Of genes that share a symbol the first wins, or the one that has no other name."""
        tokens = dict(zip(self.symbols[::-1], self.tokens[::-1].tolist(), strict=True))
        for gene, ensembl_id in enumerate(self.ensembl_ids):
            if not ensembl_id:
                tokens[self.symbols[gene]] = int(self.tokens[gene])
        tokens.pop("", None)
        return tokens

    @cached_property
    def _shared_symbols(self) -> frozenset[str]:
        uses = Counter(self.symbols)
        return frozenset(symbol for symbol, count in uses.items() if symbol and count > 1)

    def _rows(self) -> list[tuple[int, str, str]]:
        return list(zip(self.tokens.tolist(), self.ensembl_ids, self.symbols, strict=True))

    def _examples(self) -> str:
        pairs = zip(self.symbols[:3], self.ensembl_ids[:3], strict=True)
        return ", ".join(f"{s} ({e})" if s and e else s or e for s, e in pairs)


def _refuse_repeats(what: str, values: Sequence[Any]) -> None:
    if len(set(values)) != len(values):
        value, count = Counter(values).most_common(1)[0]
        raise ValueError(f"{what} {value} occurs {count} times")


def _read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_bytes(), object_pairs_hook=_dict_without_repeats)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); was it cut off?") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def _dict_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_repeats("key", [key for key, _ in pairs])
    return dict(pairs)
