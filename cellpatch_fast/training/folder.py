"""The folder of a training run: what it was asked for, how it went, and where it stands.

::

    OUTPUT/
        training.json      settings and versions; what makes another run another run
        checkpoint.pt      weights, optimiser, place in the data: all that is needed to go on
        steps.csv          one row per so many steps
        epochs.csv         one row per epoch
        tensorboard/       the same numbers, where TensorBoard is installed
        config.json …      the model so far, see `model.storage`

A checkpoint replaces the one before in one step, and knows how long the tables were when it was
written: whatever a killed run wrote beyond is cut off when it goes on. A run with other settings
does not go on; it is refused, with the difference named. Nothing in a checkpoint can hold code.

A run begins, in an empty folder or in place of another run, by writing ``training.begun.json``.
From that moment the folder is the new run's, and a model in it is refused; what is of another run
is deleted, then the file becomes ``training.json``. A kill before that moment leaves the other run
complete, a kill after it a run that goes on by itself.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import platform
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import torch

from ..errors import InputError, warn
from ..files import is_unfinished, to_disk, write_whole
from ..io.stores.partial import LOCK, differences, locked
from ..model.saving import settle
from ..model.storage import ORDER, RUN, RUN_BEGUN

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FORMAT_VERSION = 1
SETTINGS, BEGUN, CHECKPOINT = RUN, RUN_BEGUN, "checkpoint.pt"
STEPS, EPOCHS = "steps.csv", "epochs.csv"
LINEAR_METRICS = "linear_metrics.json"
RESULTS = (  # of an earlier run, which would be taken for those of a new one
    "metrics.json",
    "per_class.csv",
    "confusion.csv",
    "confusion.png",
    "confusion.svg",
    "test_predictions.csv",
    "training_curves.png",
    "training_curves.svg",
    LINEAR_METRICS,
)
FIELDS = {  # of a checkpoint
    "format_version",
    "kind",
    "model",
    "optimizer",
    "place",
    "best",
    "sizes",
    "finished",
    "threads",
}


class RunFolder:
    """A run's folder, held by one process. A context manager.

    Parameters
    ----------
    path
        The folder; made where missing.
    kind
        ``"pretraining"`` or ``"fine-tuning"``.
    settings
        All that the result depends on, JSON values by readable names.
    columns
        Names of the columns of `STEPS` and of `EPOCHS`.
    free
        Settings that a run may go on with when they have changed: how long it lasts, say.
    overwrite
        Begin anew where there is a run already.

    Raises
    ------
    InputError
        If the folder holds something else, a run with other settings, or a checkpoint that is
        damaged or not one; or another process writes there.
    OSError
        If it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        settings: Mapping[str, Any],
        columns: Mapping[str, list[str]],
        *,
        free: Collection[str] = (),
        overwrite: bool = False,
    ) -> None:
        self.path, self.kind = path, kind
        self._settings = json.loads(json.dumps(settings))
        self._columns = columns
        self._tables: dict[str, IO[str]] = {}
        self._board: SummaryWriter | None = None
        self._opened = contextlib.ExitStack()
        require_run_folder(path)
        self._opened.enter_context(held(path))
        try:
            self._tidy()
            self.checkpoint = None if overwrite else self._resume(free)
            if self.checkpoint is None:
                self._begin()
            else:
                write_whole(path / SETTINGS, self._facts())
            self._open_tables()
        except BaseException:
            self.close()
            raise

    def _tidy(self) -> None:
        """Bring to an end, or clear away, what a killed process of this run was writing."""
        settle(self.path, ORDER)
        for path in self.path.iterdir():
            if is_unfinished(path, {SETTINGS, BEGUN, CHECKPOINT, *RESULTS}):
                path.unlink()

    def _resume(self, free: Collection[str]) -> dict[str, Any] | None:
        """The last checkpoint of this very run."""
        require_same_run(self.path, self.kind, self._settings, free)
        if (self.path / BEGUN).exists() or not (self.path / CHECKPOINT).exists():
            return None
        return read_checkpoint(self.path / CHECKPOINT, self.kind)

    def _begin(self) -> None:
        """Make the folder this run's, and clear away what is of another one."""
        write_whole(self.path / BEGUN, self._facts())
        for name in (*ORDER, CHECKPOINT, STEPS, EPOCHS, *RESULTS):
            (self.path / name).unlink(missing_ok=True)
        to_disk(self.path)
        os.replace(self.path / BEGUN, self.path / SETTINGS)
        to_disk(self.path)

    def _facts(self) -> str:
        """The content of ``training.json``."""
        return json.dumps(
            {
                "kind": self.kind,
                "settings": self._settings,
                "versions": {
                    "cellpatch-fast": version("cellpatch-fast"),
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                    "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                },
            }
        )

    def _open_tables(self) -> None:
        """Cut the tables to what the checkpoint knows of, and go on behind it."""
        sizes = self.checkpoint["sizes"] if self.checkpoint else {}
        for name, columns in self._columns.items():
            path, size = self.path / name, sizes.get(name, 0)
            if size > (path.stat().st_size if path.exists() else 0):
                raise InputError(
                    f"{path} had {size:,} bytes when the checkpoint was written, and is shorter "
                    "now: restore it, or begin anew with --overwrite (overwrite=True)"
                )
            table = self._opened.enter_context(path.open("a", newline="", encoding="utf-8"))
            self._tables[name] = table
            table.truncate(size)
            table.seek(0, os.SEEK_END)  # a file opened for appending stands where its end was
            if not size:
                csv.writer(table).writerow(columns)
                table.flush()
        with contextlib.suppress(ImportError):  # TensorBoard is optional
            from torch.utils.tensorboard import SummaryWriter

            step = self.checkpoint["place"]["step"] if self.checkpoint else 0
            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)
            self._opened.callback(self._board.close)

    def add_row(self, name: str, row: Mapping[str, Any]) -> None:
        """Add a row to a table; what is None stays empty."""
        writer = csv.DictWriter(self._tables[name], self._columns[name])
        writer.writerow(row)
        self._tables[name].flush()
        if self._board is not None:
            for column, value in row.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{Path(name).stem}/{column}", value, row["step"])

    def save(self, checkpoint: Mapping[str, Any]) -> None:
        """Replace the checkpoint, in one step; `FIELDS` without those that are known here."""
        for table in self._tables.values():
            table.flush()
            os.fsync(table.fileno())  # the checkpoint relies on their sizes
        content = io.BytesIO()
        torch.save(
            {
                "format_version": FORMAT_VERSION,
                "kind": self.kind,
                "sizes": {name: table.tell() for name, table in self._tables.items()},
                **checkpoint,
            },
            content,
        )
        write_whole(self.path / CHECKPOINT, content.getbuffer())

    def close(self) -> None:
        """Let others write."""
        self._opened.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Lets no other process write in a run's folder; `InputError` if one does."""
    lock = locked(path)
    try:
        yield
    finally:
        try:
            (path / LOCK).unlink(missing_ok=True)
        finally:
            os.close(lock)  # last: nobody may lock a file that is deleted then


def require_run_folder(path: Path) -> None:
    """Refuse a place where a run cannot be kept.

    Raises
    ------
    InputError
        If it is a file, or a folder that holds other things than a run.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file: choose a folder for the training run")
    if not path.is_dir() or (path / SETTINGS).exists() or (path / BEGUN).exists():
        return
    begun = {SETTINGS, BEGUN}
    if any(file.name != LOCK and not is_unfinished(file, begun) for file in path.iterdir()):
        raise InputError(f"{path} holds other things than a training run: choose another --output")


def require_same_run(
    path: Path, kind: str, settings: Mapping[str, Any], free: Collection[str]
) -> None:
    """Refuse a folder that holds another run than this one; for the parameters see `RunFolder`.

    Raises
    ------
    InputError
        If there is a run with other settings than ``free`` ones.
    """
    if not (path / SETTINGS).exists() and not (path / BEGUN).exists():
        return
    facts = read_settings(path)
    before = {"kind": facts["kind"]} | facts["settings"]
    now = {"kind": kind} | json.loads(json.dumps(settings))
    if before | {name: now.get(name) for name in free} != now:
        raise InputError(
            f"{path} holds a run with other settings. Repeat those to go on with it, "
            f"choose another --output, or begin anew with --overwrite (overwrite=True)."
            f"{differences(before, now)}"
        )


def read_settings(path: Path) -> dict[str, Any]:
    """What ``training.json`` of a run holds: ``kind``, ``settings``, ``versions``.

    Of a run that is being set up, what ``training.begun.json`` does.

    Raises
    ------
    InputError
        If it cannot be read, or is none.
    """
    file = path / (BEGUN if (path / BEGUN).exists() else SETTINGS)
    try:
        facts = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("settings"), dict):
        raise InputError(f"{file} does not hold the settings of a training run")
    return {"kind": None, "versions": {}, **facts}


def warn_of_unfinished(model: object) -> None:
    """Say so where a model is given as the folder of a run that has not come to its end."""
    if not isinstance(model, str | os.PathLike) or not (Path(model) / CHECKPOINT).is_file():
        return
    path = Path(model)
    try:
        facts = read_settings(path)
        checkpoint = read_checkpoint(path / CHECKPOINT, facts["kind"], mapped=True)
        done, epochs = checkpoint["place"]["epoch"], facts["settings"]["epochs"]
    except (InputError, KeyError):
        return  # what is wrong with the run is no matter of the model beside it
    if not checkpoint["finished"]:
        warn(
            f"{path} is the folder of a training run that is not finished: its model is the best "
            f"of {done} of {epochs} epochs. The command that began it goes on with it"
        )


def read_checkpoint(path: Path, kind: str, *, mapped: bool = False) -> dict[str, Any]:
    """A checkpoint, on the CPU.

    Parameters
    ----------
    mapped
        Read no tensor before it is used: as fast for any size, but only while the file stays.

    Raises
    ------
    InputError
        If it is damaged, holds code, or is no checkpoint of a run of this kind.
    """
    advice = "begin anew with --overwrite (overwrite=True), or restore the file"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # of any type: the bytes of any file are taken as instructions
        raise InputError(
            f"{path} is damaged, or holds more than tensors and numbers (code is never run): "
            f"{advice}"
        ) from error
    if not isinstance(checkpoint, dict) or checkpoint.keys() != FIELDS:
        raise InputError(f"{path} is no checkpoint of a training run of cellpatch-fast: {advice}")
    if checkpoint["format_version"] != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {checkpoint['format_version']}; this package reads "
            f"{FORMAT_VERSION}: install the version named in {path.with_name(SETTINGS)}"
        )
    if checkpoint["kind"] != kind:
        raise InputError(
            f"{path} is of {checkpoint['kind']}, not of {kind}: choose another --output"
        )
    return checkpoint
