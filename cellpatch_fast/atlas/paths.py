"""Which files a run reads and which store it makes, told apart before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..io.interfaces import is_address
from ..io.stores.embeddings import EmbeddingWriter
from ..io.stores.partial import finished_facts, is_taken

FILES = {".csv", ".h5", ".h5ad", ".h5mu", ".hdf5", ".loom", ".npy", ".npz", ".parquet", ".tsv"}


def input_paths(inputs: str | Path | Sequence[str | Path]) -> list[Path | str]:
    """The inputs' paths and addresses, each once.

    Raises
    ------
    InputError
        If there is none, one is given twice, or one is no path.
    """
    several = isinstance(inputs, Sequence) and not isinstance(inputs, str)
    names = list(inputs) if several else [inputs]  # type: ignore[arg-type]
    if not names:
        raise InputError("no input was given")
    paths: dict[Path | str, Path | str] = {}
    for name in names:
        if not isinstance(name, str | Path):
            raise InputError(
                f"an input must be the path of a file, found {type(name).__name__} (an AnnData "
                "object is embedded by cellpatch_fast.tl.embed)"
            )
        if not str(name):
            raise InputError("the name of an input is empty: give the path of a file")
        path = str(name).rstrip("/") if is_address(name) else Path(name).expanduser()
        before = paths.setdefault(path.resolve() if isinstance(path, Path) else path, path)
        if before is not path:
            raise InputError(f"{path} was given twice (first as {before}): give each input once")
    return list(paths.values())


def output_path(
    output: str | Path, inputs: Sequence[Path | str], kind: str, attribute: str
) -> Path:
    """The output's path, if a store can be made there.

    Parameters
    ----------
    output
        As the user gave it.
    inputs
        What is read, and must not be written to.
    kind
        What is made, in words: ``"embedding store"``.
    attribute
        Of the root of such a store; only what has it may be replaced.

    Raises
    ------
    InputError
        If there is something else, it lies within an input, or is named like a file: a folder
        called cells.h5ad could not be opened by what opens .h5ad files.
    """
    if is_address(output):
        raise InputError(f"{output} is an address: stores are written to folders of this machine")
    path = Path(output).expanduser()
    if not str(output) or not path.name:
        raise InputError(f"{str(output)!r} cannot be the output: give the path of a new folder")
    path = path.resolve() if path.is_symlink() else path
    if is_taken(path) and finished_facts(path, attribute) is None:
        article = "an" if kind[0] in "aeiou" else "a"
        raise InputError(
            f"{path} exists and is not {article} {kind}, so it is not replaced: choose another "
            "output, or move it away"
        )
    if path.suffix.lower() in FILES:
        store = path.with_suffix(".zarr").name
        message = (
            f"the output {path} is named like a file, but a store is a folder: call it {store}"
        )
        if kind == EmbeddingWriter.KIND:
            message += (
                f". Where it fits in memory, anndata.read_zarr({store!r}).write_h5ad("
                f"{path.name!r}) makes a file of it"
            )
        raise InputError(message)
    for taken in (taken for taken in inputs if isinstance(taken, Path)):
        if taken.resolve() in (path.resolve(), *path.resolve().parents):
            raise InputError(f"the output {path} lies within the input {taken}: choose another")
    return path
