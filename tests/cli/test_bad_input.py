"""Bad input: one message that names the file and what to do, and nothing that looks finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import anndata
import numpy as np
import pytest
import zarr
from scipy import sparse

from cellpatch_fast import CellPatch, cli
from cellpatch_fast.io.stores.partial import partial_of

from ..conftest import GENES, Change, Changed, Embed, MakeCells, Refused, write_zarr

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def changed(cells_file: Path) -> Changed:
    """``changed(change)``: the path of a file of cells that ``change`` has been applied to."""

    def make(change: Change) -> Path:
        adata = anndata.read_h5ad(cells_file)
        change(adata)
        path = cells_file.with_name("changed.h5ad")
        adata.write_h5ad(path)
        return path

    return make


def test_missing_file(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "missing.h5ad"
    assert refused(path) == f"{path}: no such file or folder. Check the path."


@pytest.mark.filterwarnings("ignore:::mudata")
def test_several_modalities_in_a_file(
    refused: Refused, make_cells: MakeCells, tmp_path: Path
) -> None:
    mudata = pytest.importorskip("mudata")
    path = tmp_path / "several.h5mu"
    mudata.MuData({"rna": make_cells(5), "atac": make_cells(5)}).write_h5mu(path)
    assert refused(path) == (
        f"{path} is a MuData file, which holds atac, rna. Write the one with genes to a file of "
        "its own: mudata.read(FILE)['rna'].write_h5ad('rna.h5ad')."
    )


def test_second_of_two_files_is_missing(refused: Refused, cells_file: Path, tmp_path: Path) -> None:
    assert str(tmp_path / "missing.h5ad") in refused(cells_file, tmp_path / "missing.h5ad", log=1)


@pytest.mark.parametrize("name", ["text.h5ad", "folder.zarr", "empty.h5ad", "model"])
def test_not_an_anndata_file(
    refused: Refused, tmp_path: Path, model_directory: Path, name: str
) -> None:
    path = tmp_path / name
    if name == "text.h5ad":
        path.write_text("gene,count\n")
    elif name == "empty.h5ad":
        path.touch()
    elif name == "model":
        path = model_directory
    else:
        path.mkdir()
    message = refused(path)
    assert message.startswith(str(path))
    assert "Expected an AnnData file (.h5ad or .zarr) or 10x Genomics output" in message


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_truncated_h5ad(refused: Refused, cells_file: Path, kept: float) -> None:
    content = cells_file.read_bytes()
    cells_file.write_bytes(content[: int(kept * len(content))])
    message = refused(cells_file)
    assert str(cells_file) in message
    assert "truncated or damaged: copy or download it again" in message


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("part", ["data", "indices", "indptr"])
def test_corrupted_zarr_chunk(
    refused: Refused, make_cells: MakeCells, tmp_path: Path, version: Literal[2, 3], part: str
) -> None:
    path = write_zarr(make_cells(), tmp_path / "cells.zarr", version)
    chunk = path / "X" / part / ("0" if version == 2 else "c/0")
    content = bytearray(chunk.read_bytes())
    content[: len(content) // 2] = b"\xa5" * (len(content) // 2)
    chunk.write_bytes(content)
    message = refused(path)
    assert str(path) in message
    assert "damaged" in message


def test_damage_that_shows_late_leaves_what_was_done(
    embed_command: Embed,
    make_cells: MakeCells,
    tmp_path: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And it is not called finished. Of a large file: a small one is read to tell it apart."""
    sample_the_beginning(monkeypatch)
    for name, number in (("WHOLE_BYTES", 1), ("BLOCK_BYTES", 1), ("LEAST_BLOCKS", 2)):
        monkeypatch.setattr(f"cellpatch_fast.io.sources.identity.{name}", number)
    path = damaged_within(write_zarr(make_cells(), tmp_path / "cells.zarr"))
    code, err = embed_command(path)
    assert code == 1
    assert "the chunk file X/data/c/7" in err
    assert not output.exists()
    assert partial_of(output).exists()


def test_damage_that_shows_at_once_is_named(
    embed_command: Embed,
    make_cells: MakeCells,
    tmp_path: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sample_the_beginning(monkeypatch)
    path = damaged_within(write_zarr(make_cells(), tmp_path / "cells.zarr"))
    code, err = embed_command(path)
    assert code == 1
    assert "cannot read X/data from row 0 on" in err
    assert "copy or download it again" in err
    assert not output.exists()


def sample_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a matrix holds is told from its first ten cells."""
    monkeypatch.setattr("cellpatch_fast.loading.inputs.SAMPLE_CELLS", 10)
    monkeypatch.setattr("cellpatch_fast.loading.inputs.SAMPLE_RUNS", 1)


def damaged_within(path: Path) -> Path:
    """A Zarr file in small chunks, of which the eighth of the values is damaged."""
    for part in ("data", "indices"):
        array = zarr.open_array(path / "X" / part)
        settings: dict[str, Any] = {"chunks": (500,), "attributes": dict(array.attrs)}
        zarr.create_array(path / "X" / part, data=np.asarray(array), overwrite=True, **settings)
    (path / "X" / "data" / "c" / "7").write_bytes(b"\xa5" * 100)
    return path


@pytest.mark.parametrize("cells", [0, 5])
def test_nothing_to_embed(refused: Refused, tmp_path: Path, cells: int) -> None:
    path = tmp_path / "empty.h5ad"
    genes = 0 if cells else 5
    anndata.AnnData(sparse.csr_matrix((cells, genes), dtype=np.float32)).write_h5ad(path)
    noun = "genes" if cells else "cells"
    assert f"{path}: X holds 0 {noun} (its shape is {cells} x {genes})" in refused(path)


def test_layer_that_does_not_exist(refused: Refused, cells_file: Path) -> None:
    message = refused(cells_file, "--layer", "spliced")
    assert message == f"{cells_file} has no layer 'spliced'. Its layers: other; raw: yes; X: yes."
    assert "exclude each other" in refused(cells_file, "--layer", "other", "--use-raw")


def test_raw_that_does_not_exist(refused: Refused, changed: Changed) -> None:
    path = changed(lambda adata: delattr(adata, "raw"))
    assert f"{path} has no raw. Its layers: other" in refused(path, "--use-raw")


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (-3, "the value is -3. Counts and their logarithms are never negative"),
        (np.nan, "the value is nan, which is not a finite number"),
        (np.inf, "the value is inf, which is not a finite number"),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_values_that_cannot_be(
    refused: Refused,
    changed: Changed,
    monkeypatch: pytest.MonkeyPatch,
    value: float,
    found: str,
    late: bool,
) -> None:
    """In the cells that are looked at before, or in those that come much later."""
    monkeypatch.setattr("cellpatch_fast.loading.inputs.SAMPLE_CELLS", 100 if late else 300)
    cell = {}

    def change(adata: anndata.AnnData) -> None:
        adata.X.data[-1] = value
        cell["last"] = adata.n_obs - 1

    path = changed(change)
    message = refused(path, log=int(late))
    assert f"{path}: cell {cell['last']} (the first is 0), gene column " in message
    assert found in message
    assert "layer or use_raw" in message


def normalise(adata: anndata.AnnData, log: bool) -> None:
    library = np.maximum(adata.X.sum(1, dtype=np.float64), 1)
    values = sparse.csr_matrix(adata.X.multiply(1e4 / library))
    adata.X = (values.log1p() if log else values).astype(np.float32)


def test_counts_expected_but_normalised_found(refused: Refused, changed: Changed) -> None:
    path = changed(lambda adata: normalise(adata, log=False))
    message = refused(path, "--values", "counts")
    assert message.startswith(f"{path}: raw counts were expected, but found normalised values")
    assert '"auto"' in message


def test_counts_expected_but_logarithms_found(refused: Refused, changed: Changed) -> None:
    path = changed(lambda adata: normalise(adata, log=True))
    message = refused(path, "--values", "counts")
    assert message.startswith(f"{path}: raw counts were expected, but found natural logarithms")


def test_logarithms_expected_but_counts_found(refused: Refused, changed: Changed) -> None:
    path = changed(lambda adata: adata.X.data.__setitem__(3, 400))
    message = refused(path, "--values", "lognorm")
    assert message.startswith(f"{path}: log-normalised values were expected, but found integers")


def test_logged_matrix_is_not_logged_again(
    embed_command: Embed, changed: Changed, output: Path
) -> None:
    """It is recognised, said, and used as it is."""
    code, err = embed_command(changed(lambda adata: normalise(adata, log=True)))
    assert code == 0
    assert "natural logarithms of normalised counts" in err
    (described,) = anndata.read_zarr(output).uns["X_cellpatch"]["params"]["inputs"]
    assert "lognorm" in described


def test_logarithms_to_another_base(refused: Refused, changed: Changed) -> None:
    def change(adata: anndata.AnnData) -> None:
        normalise(adata, log=True)
        adata.X.data /= np.float32(np.log(2))

    path = changed(change)
    message = refused(path)
    assert str(path) in message
    assert "logarithms to base 2" in message


def test_no_gene_matches(refused: Refused, changed: Changed) -> None:
    def change(adata: anndata.AnnData) -> None:
        adata.var_names = [f"Mus{n}" for n in range(adata.n_vars)]
        adata.var["biotype"] = "coding"

    path = changed(change)
    message = refused(path)
    assert f"{path}: none of its {GENES + 3} genes is in the vocabulary" in message
    assert all(name in message for name in ("Mus0", "Mus1", "Mus2"))
    assert message.count("ENSG") >= 3
    assert "--gene-column" in message
    assert "biotype" in message


def test_gene_column_that_does_not_exist(refused: Refused, cells_file: Path) -> None:
    message = refused(cells_file, "--gene-column", "symbols")
    assert str(cells_file) in message
    assert "symbols" in message


def test_fewer_than_half_of_the_genes_match(embed_command: Embed, changed: Changed) -> None:
    """A warning with counts, and the run goes on."""

    def change(adata: anndata.AnnData) -> None:
        names = [f"Mus{n}" for n in range(adata.n_vars - 20)]
        adata.var_names = [*adata.var_names[:20], *names]
        del adata.raw

    path = changed(change)
    code, err = embed_command(path)
    assert code == 0
    warning = err.splitlines()[0]
    assert warning.startswith(f"cellpatch: warning: {path}: only 20 of {GENES + 3} genes matched")
    assert "290 unknown" in warning


def test_output_that_exists(
    refused: Refused, embed_command: Embed, cells_file: Path, output: Path
) -> None:
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    for options in ([], ["--overwrite"]):
        code, err = embed_command(cells_file, *options)
        assert code == 1
        assert f"{output} exists and is not an embedding store" in err
        assert [path.name for path in output.iterdir()] == ["notes.txt"]


def test_output_of_other_settings_exists(
    embed_command: Embed, cells_file: Path, output: Path
) -> None:
    assert embed_command(cells_file)[0] == 0
    code, err = embed_command(cells_file, "--pool", "mean")
    assert code == 1
    assert f"{output} exists and was made with other settings" in err
    assert "pool: was 'flatten', is now 'mean'" in err
    assert embed_command(cells_file, "--pool", "mean", "--overwrite")[0] == 0


def test_output_below_a_file(
    capsys: Capture, cells_file: Path, model_directory: Path, small_model: CellPatch
) -> None:
    output = cells_file / "out.zarr"
    command = ["embed", cells_file, "--model", model_directory, "--output", output]
    assert cli.main([str(part) for part in command]) == 1
    assert str(cells_file) in capsys.readouterr().err


def test_output_where_nothing_can_be_written(
    capsys: Capture, cells_file: Path, model_directory: Path
) -> None:
    """/proc lets nobody make a folder, not even root."""
    if not Path("/proc/self").exists():
        pytest.skip("there is no /proc on this system")
    command = ["embed", cells_file, "--model", model_directory, "--output", "/proc/out.zarr"]
    assert cli.main([str(part) for part in command]) == 1
    *_, message = capsys.readouterr().err.splitlines()
    assert "/proc/out.zarr" in message
    assert "Check the path and its permissions" in message
