"""GeneVocabulary: every name finds its gene, and whatever does not is said."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellpatch_fast.errors import InputError
from cellpatch_fast.genes.vocabulary import GeneMatchWarning, GeneVocabulary

HUMAN = GeneVocabulary.human()
CD3D, MS4A1 = "ENSG00000167286", "ENSG00000156738"
RGS5 = ("ENSG00000143248", "ENSG00000232995")  # two genes of one symbol, in the genome's order

# few Ensembl IDs and symbols (some of them real, two of them shared), so that clashes are common
ENSEMBL_IDS = st.sampled_from([CD3D, MS4A1, *RGS5, "ENSG00000117525", "ENSG99999999999"])
SYMBOLS = st.sampled_from(["CD3D", "MS4A1", "RGS5", "F3", "Y_RNA", "MT-CO1", "HLA-DRB1", "ENSAP1"])
VERSIONS = st.sampled_from(["", ".1", ".18", ".15_PAR_Y"])
NAMES = st.one_of(
    SYMBOLS,
    st.builds("{}{}".format, ENSEMBL_IDS, VERSIONS),
    st.builds("{}_{}".format, SYMBOLS, ENSEMBL_IDS),
)

relaxed = settings(max_examples=60, deadline=None)  # a busy machine is no failure


def tokens(vocabulary: GeneVocabulary, *names: str) -> list[int]:
    return [int(token) for token in vocabulary.match(names).tokens]


def write_json(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


class TestMatch:
    def test_known_genes(self) -> None:
        match = HUMAN.match(["CD3D", CD3D, "MS4A1", MS4A1])
        cd3d, ms4a1 = HUMAN.ensembl_ids.index(CD3D) + 1, HUMAN.ensembl_ids.index(MS4A1) + 1
        assert match.tokens.tolist() == [cd3d, cd3d, ms4a1, ms4a1]
        assert match.tokens.dtype == np.int32
        assert HUMAN.symbols[cd3d - 1] == "CD3D"

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param(f"{CD3D}.14", id="version"),
            pytest.param(f"CD3D_{CD3D}", id="symbol and ID"),
            pytest.param(f"CD3D_{CD3D}.14", id="symbol and ID with version"),
            pytest.param(f"GRCh38_{CD3D}", id="genome and ID"),
            pytest.param(f"{CD3D}.14_PAR_Y", id="copy on the Y chromosome"),
        ],
    )
    def test_an_ensembl_id_decides(self, name: str) -> None:
        assert tokens(HUMAN, name) == tokens(HUMAN, CD3D)

    @pytest.mark.parametrize(
        "name",
        ["", "cd3d", " CD3D", "CD3D.1", "CD3D-1", f"x{CD3D}", f"{CD3D}x", f"{CD3D}\n", CD3D[:-1]],
    )
    def test_nothing_is_guessed(self, name: str) -> None:
        match = HUMAN.match([name])
        assert match.tokens.tolist() == [-1]
        assert match.unknown == [name]

    def test_pseudoautosomal_copy_is_reported_as_a_duplicate(self) -> None:
        names = ["ENSG00000182378.15", "CD3D", "ENSG00000182378.15_PAR_Y"]
        match = HUMAN.match(names)
        assert match.matched == 3
        assert match.duplicated == [names[0], names[2]]

    def test_shared_symbol_is_the_first_gene_and_reported(self) -> None:
        match = HUMAN.match(["RGS5", "CD3D"])
        assert match.ambiguous == ["RGS5"]
        assert match.tokens[0] == tokens(HUMAN, RGS5[0])[0] < tokens(HUMAN, RGS5[1])[0]
        assert HUMAN.match([f"RGS5_{RGS5[1]}", RGS5[0]]).ambiguous == []

    def test_counts_and_summary(self) -> None:
        match = HUMAN.match(["CD3D", "nonsense", CD3D, "RGS5", "nonsense"])
        assert match.matched == 3
        assert match.unknown == ["nonsense", "nonsense"]
        assert match.duplicated == ["CD3D", CD3D]
        assert str(match) == ("3 of 5 genes matched by names, 2 unknown, 2 duplicated, 1 ambiguous")

    def test_no_names(self) -> None:
        match = HUMAN.match([])
        assert (len(match.tokens), match.matched) == (0, 0)

    @relaxed
    @given(st.lists(st.one_of(NAMES, st.text(max_size=5)), max_size=23))
    def test_every_name_is_accounted_for(self, names: list[str]) -> None:
        match = HUMAN.match(names)
        known = match.tokens >= 0
        assert match.unknown == [n for n, k in zip(names, known, strict=True) if not k]
        assert match.matched == known.sum() == len(names) - len(match.unknown)
        repeated = [match.tokens.tolist().count(token) > 1 for token in match.tokens]
        assert match.duplicated == [
            n for n, k, r in zip(names, known, repeated, strict=True) if k and r
        ]
        # a name's token depends on that name alone
        assert match.tokens.tolist() == [tokens(HUMAN, name)[0] for name in names]


class TestMatchVar:
    SYMBOLS = ("CD3D", "MS4A1", "RGS5", "nonsense", "F3")
    IDS = (CD3D, MS4A1, *RGS5, "ENSG00000117525")

    def test_takes_the_column_with_most_matches(self) -> None:
        var = pd.DataFrame({"gene_ids": self.IDS, "n_cells": 7}, index=self.SYMBOLS)
        match = HUMAN.match_var(var, None, "a.h5ad")
        assert match.source == "column 'gene_ids'"
        assert match.tokens.tolist() == tokens(HUMAN, *self.IDS)

        var = pd.DataFrame({"feature_name": self.SYMBOLS}, index=self.IDS)
        assert HUMAN.match_var(var, None, "a.h5ad").source == "the var index"

    def test_a_tie_goes_to_the_unambiguous_names(self) -> None:
        var = pd.DataFrame({"gene_ids": [CD3D, RGS5[1]]}, index=["CD3D", "RGS5"])
        assert HUMAN.match_var(var).tokens.tolist() == tokens(HUMAN, CD3D, RGS5[1])

    def test_a_chosen_column_is_obeyed(self) -> None:
        var = pd.DataFrame(
            {"gene_ids": self.IDS, "mine": [*self.SYMBOLS[:3], "CD8A", "CD4"]}, index=self.SYMBOLS
        )
        assert HUMAN.match_var(var, "mine").source == "column 'mine'"
        assert HUMAN.match_var(var, "index").source == "the var index"
        assert HUMAN.match_var(var.rename_axis("genes"), "genes").source == "the var index"

    @pytest.mark.parametrize("dtype", ["object", "string", "category"])
    def test_missing_names_are_unknown(self, dtype: str) -> None:
        var = pd.DataFrame({"symbol": pd.Series(["CD3D", None, "MS4A1"], dtype=dtype)})
        match = HUMAN.match_var(var, "symbol")
        assert match.tokens.tolist() == [*tokens(HUMAN, "CD3D"), -1, *tokens(HUMAN, "MS4A1")]
        assert match.unknown == [""]

    def test_missing_column_lists_the_columns(self) -> None:
        var = pd.DataFrame({"gene_ids": self.IDS, "n_cells": 7}, index=self.SYMBOLS)
        with pytest.raises(InputError, match=r"a.h5ad.*'ensembl'.*'index', 'gene_ids', 'n_cells'"):
            HUMAN.match_var(var, "ensembl", "a.h5ad")

    def test_no_match_shows_three_names_of_each_side(self) -> None:
        var = pd.DataFrame({"symbol": list("pqrst")}, index=["Cd3d", "Ms4a1", "Rgs5", "F3x", "F4x"])
        with pytest.raises(InputError) as caught:
            HUMAN.match_var(var, None, "mouse.h5ad")
        for part in (
            *("mouse.h5ad", "none of its 5 genes", "'Cd3d', 'Ms4a1', 'Rgs5', …", "'p', 'q', 'r'"),
            *("DDX11L1 (ENSG00000223972), WASH7P", "MIR6859-1", "gene_column", "'index', 'symbol'"),
        ):
            assert part in str(caught.value)

    def test_fewer_than_half_matched_warns_with_counts(self) -> None:
        names = ["CD3D", "MS4A1", "n1", "n2", "n3"]
        with pytest.warns(GeneMatchWarning, match=r"a.h5ad: only 2 of 5 genes.*'n1', 'n2', 'n3'"):
            assert HUMAN.match_var(pd.DataFrame(index=names), None, "a.h5ad").matched == 2
        HUMAN.match_var(pd.DataFrame(index=names[:4]))  # half is enough: warnings are errors here

    def test_no_genes(self) -> None:
        with pytest.raises(InputError, match=r"a.h5ad: it has no genes"):
            HUMAN.match_var(pd.DataFrame(index=[]), None, "a.h5ad")


class TestAdd:
    def test_unknown_genes_get_the_next_tokens(self) -> None:
        names = ["nova-1", "CD3D", "ENSG99999999999.2", "nova-1", "NOVA_ENSMUSG00000000001"]
        more = HUMAN.add(names)
        assert tokens(more, *names) == [60_665, *tokens(HUMAN, "CD3D"), 60_666, 60_665, 60_667]
        assert (len(more), more.size) == (60_667, 60_668)
        assert tokens(more, "ENSG99999999999", "NOVA", "ENSMUSG00000000001.5") == [
            *(60_666, 60_667, 60_667)
        ]
        assert more.ensembl_ids[-3:] == ("", "ENSG99999999999", "ENSMUSG00000000001")
        assert len(HUMAN) == 60_664  # the old one is as it was

    def test_nothing_new_is_the_same_vocabulary(self) -> None:
        assert HUMAN.add(["CD3D", f"{MS4A1}.2"]) == HUMAN

    def test_up_to_max_genes_and_an_error_beyond(self) -> None:
        names = [f"nova-{number}" for number in range(70_000 - HUMAN.size)]
        full = HUMAN.add(names)
        assert full.size == 70_000
        assert full.add(names).size == 70_000
        with pytest.raises(InputError, match=r"1 genes \('one more'\).*room for 0.*70,000"):
            full.add(["one more"])
        with pytest.raises(InputError, match=r"13 genes.*'nova-2', ….*room for 7.*max_genes"):
            HUMAN.add(names[:13], max_genes=60_672)

    def test_refuses_an_empty_name(self) -> None:
        with pytest.raises(InputError, match="empty"):
            HUMAN.add(["CD3D", ""])

    @relaxed
    @given(st.lists(NAMES, max_size=7), st.lists(NAMES, max_size=11))
    def test_adds_every_name_and_moves_none(self, first: list[str], second: list[str]) -> None:
        before = GeneVocabulary([], []).add(first)
        after = before.add(second)
        assert after.match([*first, *second]).unknown == []
        assert tokens(after, *first) == tokens(before, *first)
        assert after.tokens.tolist() == list(range(1, len(after) + 1))


class TestRules:
    @pytest.mark.parametrize(
        ("ensembl_ids", "symbols", "numbers", "message"),
        [
            pytest.param(["", ""], ["a", "b"], [2, 2], "token 2 occurs 2 times", id="token twice"),
            pytest.param(["", ""], ["a", "b"], [0, 1], "token 0 is not between", id="padding"),
            pytest.param([""], ["a"], [10**30], "token 1000", id="beyond int64"),
            pytest.param([CD3D, CD3D], ["a", "b"], None, f"Ensembl ID {CD3D}", id="ID twice"),
            pytest.param(["", ""], ["a", "a"], None, "Ensembl ID a occurs", id="name twice"),
            pytest.param([""], [""], None, "neither", id="no name"),
            pytest.param([f"{CD3D}.3"], ["a"], None, "version", id="ID with version"),
            pytest.param([""], ["a", "b"], None, "same genes", id="lengths"),
        ],
    )
    def test_are_checked(
        self, ensembl_ids: list[str], symbols: list[str], numbers: list[int] | None, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            GeneVocabulary(ensembl_ids, symbols, numbers)

    def test_tokens_may_have_gaps_and_any_order(self) -> None:
        vocabulary = GeneVocabulary(["", CD3D, ""], ["a", "CD3D", "b"], [11, 3, 7])
        assert tokens(vocabulary, "a", "b", "CD3D", CD3D) == [11, 7, 3, 3]
        assert (len(vocabulary), vocabulary.size) == (3, 12)
        assert vocabulary.symbols == ("CD3D", "b", "a")

    def test_empty_vocabulary(self) -> None:
        nothing = GeneVocabulary([], [])
        assert (len(nothing), nothing.size) == (0, 1)
        assert tokens(nothing, "CD3D") == [-1]
        assert repr(nothing) == "<GeneVocabulary: no genes>"

    def test_repr_says_what_it_is(self) -> None:
        assert repr(HUMAN) == (
            "<GeneVocabulary: 60,664 genes, tokens 1 to 60,664: DDX11L1 (ENSG00000223972), "
            "WASH7P (ENSG00000227232), MIR6859-1 (ENSG00000278267), …; fingerprint 10d969410ef7>"
        )


class TestFingerprint:
    def test_survives_saving_and_order(self, tmp_path: Path) -> None:
        one = GeneVocabulary([CD3D, "", MS4A1], ["CD3D", "a", ""], [5, 2, 3])
        other = GeneVocabulary([MS4A1, CD3D, ""], ["", "CD3D", "a"], [3, 5, 2])
        one.save(tmp_path / "vocabulary.json")
        loaded = GeneVocabulary.load(tmp_path / "vocabulary.json")
        assert one.fingerprint == other.fingerprint == loaded.fingerprint
        assert re.fullmatch("[0-9a-f]{64}", one.fingerprint)

    @pytest.mark.parametrize(
        "changed",
        [
            pytest.param(GeneVocabulary([CD3D, ""], ["CD3D", "a"], [1, 3]), id="token"),
            pytest.param(GeneVocabulary([CD3D, ""], ["CD3D", "b"]), id="symbol"),
            pytest.param(GeneVocabulary([MS4A1, ""], ["CD3D", "a"]), id="Ensembl ID"),
            pytest.param(GeneVocabulary(["", CD3D], ["a", "CD3D"]), id="order"),
            pytest.param(GeneVocabulary([CD3D, "", ""], ["CD3D", "a", "b"]), id="one more"),
        ],
    )
    def test_changes_with_content(self, changed: GeneVocabulary) -> None:
        assert changed != GeneVocabulary([CD3D, ""], ["CD3D", "a"])


class TestOnDisk:
    @relaxed
    @given(names=st.lists(st.one_of(NAMES, st.text(min_size=1)).filter(str.strip), max_size=13))
    def test_round_trip(self, names: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
        vocabulary = GeneVocabulary([], []).add(names)
        path = tmp_path_factory.mktemp("genes") / "vocabulary.json"
        vocabulary.save(path)
        loaded = GeneVocabulary.load(path)
        assert loaded == vocabulary
        assert tokens(loaded, *names) == tokens(vocabulary, *names)
        assert [file.name for file in path.parent.iterdir()] == [path.name]

    def test_human_reference_with_additions(self, tmp_path: Path) -> None:
        more = HUMAN.add(["nova-1"])
        more.save(tmp_path / "vocabulary.json")
        loaded = GeneVocabulary.load(tmp_path / "vocabulary.json")
        assert loaded == more != HUMAN
        assert loaded.size == 60_666

    def test_a_failed_save_leaves_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "vocabulary.json"
        HUMAN.save(path)
        before = path.read_bytes()
        code = (  # a file-size limit stands for a full disk
            "import resource, signal, sys; from cellpatch_fast.genes import GeneVocabulary;"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
            "GeneVocabulary.human().add(['nova-1']).save(sys.argv[1])"
        )
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
        assert "OSError" in done.stderr
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == [path.name]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            pytest.param("", "not valid JSON", id="empty file"),
            pytest.param('{"format": "cellpatch voc', "not valid JSON.*cut off", id="cut off"),
            pytest.param([], "not a cellpatch-fast vocabulary", id="list"),
            pytest.param({"CD3D": 1}, "gene2tok.json.*from_original", id="the original's"),
            pytest.param({"format_version": 2}, "newer cellpatch-fast", id="newer"),
            pytest.param({"genes": None}, "list of genes is missing", id="no genes"),
            pytest.param({"genes": [[1, CD3D, "a"], [2, MS4A1]]}, "gene 1 is", id="short row"),
            pytest.param({"genes": [[1.0, CD3D, "a"]]}, "gene 0 is", id="token is no integer"),
            pytest.param({"genes": [[True, CD3D, "a"]]}, "gene 0 is", id="token is a truth value"),
            pytest.param(
                {"genes": [[1, CD3D, "a"], [1, MS4A1, "b"]]}, "token 1 occurs 2", id="token twice"
            ),
            pytest.param({"genes": [[0, CD3D, "a"]]}, "token 0 is not between", id="token 0"),
            pytest.param({"genes": [[1, f"{CD3D}.3", "a"]]}, "version", id="ID with version"),
        ],
    )
    def test_bad_files_are_named(self, tmp_path: Path, content: Any, message: str) -> None:
        if isinstance(content, dict) and "CD3D" not in content:
            content = {"format": "cellpatch vocabulary", "format_version": 1, "genes": []} | content
        path = write_json(tmp_path / "vocabulary.json", content)
        with pytest.raises(InputError, match=f"vocabulary.json: .*{message}"):
            GeneVocabulary.load(path)

    def test_missing_file(self, tmp_path: Path) -> None:
        for read in (GeneVocabulary.load, GeneVocabulary.from_original):
            with pytest.raises(InputError, match=r"nowhere.json: .*No such file"):
                read(tmp_path / "nowhere.json")


class TestOriginal:
    def test_all_forms_of_names(self, tmp_path: Path) -> None:
        path = write_json(
            tmp_path / "gene2tok.json",
            {"CD3D": 2, f"RGS5_{RGS5[1]}": 7, "ENSG00000276345.1": 3, "nova": 13, "F3": 5},
        )
        vocabulary = GeneVocabulary.from_original(path)
        assert (len(vocabulary), vocabulary.size) == (5, 14)
        assert tokens(vocabulary, "CD3D", "RGS5", "ENSG00000276345.1", "nova") == [2, 7, 3, 13]

    def test_data_with_ensembl_ids_work(self, tmp_path: Path) -> None:
        path = write_json(tmp_path / "gene2tok.json", {"MS4A1": 3, f"RGS5_{RGS5[1]}": 2, "CD3D": 7})
        vocabulary = GeneVocabulary.from_original(path)
        assert tokens(vocabulary, f"{CD3D}.14", MS4A1, RGS5[1], RGS5[0]) == [7, 3, 2, -1]

    def test_a_symbol_of_several_genes_is_not_translated(self, tmp_path: Path) -> None:
        path = write_json(tmp_path / "gene2tok.json", {"RGS5": 2, "CD3D": 1})
        assert tokens(GeneVocabulary.from_original(path), "RGS5", *RGS5) == [2, -1, -1]

    def test_whole_reference_in_the_original_order(self, tmp_path: Path) -> None:
        """A dict like the original's: sorted names, duplicated symbols with their ID."""
        names = [
            f"{e}.1" if not s else f"{s}_{e}" if s in HUMAN._shared_symbols else s
            for s, e in zip(HUMAN.symbols, HUMAN.ensembl_ids, strict=True)
        ]
        expected = {name: token for token, name in enumerate(sorted(names), 1)}
        vocabulary = GeneVocabulary.from_original(write_json(tmp_path / "gene2tok.json", expected))
        assert len(vocabulary) == 60_664
        assert tokens(vocabulary, *names) == [expected[name] for name in names]
        assert tokens(vocabulary, *HUMAN.ensembl_ids) == [expected[name] for name in names]

    @relaxed
    @given(names=st.lists(NAMES, min_size=1, max_size=17, unique=True), random=st.randoms())
    def test_every_name_finds_its_own_token(
        self, names: list[str], random: Any, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        numbers = random.sample(range(1, 101), len(names))
        path = tmp_path_factory.mktemp("original") / "gene2tok.json"
        write_json(path, dict(zip(names, numbers, strict=True)))
        vocabulary = GeneVocabulary.from_original(path)
        assert tokens(vocabulary, *names) == numbers
        vocabulary.save(path)
        assert tokens(GeneVocabulary.load(path), *names) == numbers

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            pytest.param("{", "not valid JSON", id="cut off"),
            pytest.param([["CD3D", 1]], "no dict", id="list"),
            pytest.param({}, "empty", id="empty"),
            pytest.param({"CD3D": "1"}, "'CD3D' has \"1\"", id="token is text"),
            pytest.param({"": 1}, "'' has 1", id="empty name"),
            pytest.param({"CD3D": 0}, "token 0 is not between", id="padding"),
            pytest.param({"CD3D": 1, "MS4A1": 1}, "token 1 occurs 2", id="token twice"),
            pytest.param('{"CD3D": 1, "CD3D": 2}', "CD3D occurs 2 times", id="name twice"),
        ],
    )
    def test_bad_files_are_named(self, tmp_path: Path, content: Any, message: str) -> None:
        path = write_json(tmp_path / "gene2tok.json", content)
        with pytest.raises(InputError, match=f"gene2tok.json: .*{message}"):
            GeneVocabulary.from_original(path)
