"""The results file of one run of `pytest bench`: all that tables, figures and comparisons are of.

One JSON file holds one run: device, versions, settings, ceilings, models and a record for every
attempt, whatever came of it. It is checked when it is made, so that a mistake shows where it was
made, and again when it is read. A record that is not measured has no time, and says why.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cellpatch_fast.errors import InputError
from cellpatch_fast.files import write_whole

FORMAT, FORMAT_VERSION = "cellpatch-fast benchmarks", 1
STATUSES = ("measured", "out of memory", "out of time", "inaccurate", "failed", "skipped")
# The groups, with the details that a measured record of each has at least.
GROUPS: dict[str, dict[str, type]] = {
    "runtime": {"model": str, "genes": int},
    "training": {"model": str, "task": str},
    "kernels": {"op": str, "case": str, "method": str},
    "loader": {"system": str, "layout": str},
    "atlas": {"cells": int},
    "startup": {"what": str},
}
# Details that are numbers, or None, wherever they stand.
NUMBERS = (
    *("ignored", "tokens", "batch", "setup_seconds", "first_call_seconds", "peak_bytes"),
    *("peak_bytes_per_cell", "model_bytes", "cells", "genes", "genes_per_cell"),
    *("cells_per_second", "genes_per_second", "nonzeros_per_second", "bytes_per_second"),
    *("flops", "intensity", "roofline_share", "error", "bound", "limit"),
    *("peak_rss_bytes", "output_bytes", "parameters", "published", "cap"),
)
DEVICE = {"type": str, "name": str, "slug": str}
MODEL = {"ours": bool}
SLUG = re.compile(r"[a-z0-9][a-z0-9.-]*")
NAME = re.compile(r"(\d{4}-\d\d-\d\dT\d{4})(?:-(\d+))?")  # of a results file, without .json


@dataclass(frozen=True)
class Timing:
    """Seconds: the median of the repeats, and their 20th and 80th percentiles."""

    p20: float
    median: float
    p80: float
    repeats: int

    def __post_init__(self) -> None:
        if not 0 < self.p20 <= self.median <= self.p80 < math.inf or self.repeats < 1:
            raise ValueError(f"a time is 0 < p20 <= median <= p80, of 1 repeat at least: {self}")


@dataclass(frozen=True)
class Record:
    """One attempt to measure one thing.

    Parameters
    ----------
    group
        One of `GROUPS`.
    name
        Unique within the run: ``"runtime/Geneformer V1/2000"``. Runs are compared by it.
    status
        One of `STATUSES`.
    reason
        In one line, why it is not measured; for ``"measured"`` it may be empty.
    seconds
        Of what `per` says; only of what is measured.
    per
        ``"1,000 cells"``, ``"step"``, ``"call"`` or ``"run"``.
    details
        JSON values by name; those in `GROUPS` are needed.

    Raises
    ------
    ValueError
        If they do not fit together, or a detail is not JSON: NaN and infinity are not.
    """

    group: str
    name: str
    status: str
    reason: str = ""
    seconds: Timing | None = None
    per: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not all(isinstance(text, str) for text in (self.name, self.reason, self.per)):
            raise TypeError(f"name, reason and per are texts: {self}")
        if self.group not in GROUPS:
            raise ValueError(f"{self.name}: group {self.group!r} is none of {', '.join(GROUPS)}")
        if self.status not in STATUSES:
            raise ValueError(f"{self.name}: status {self.status!r} is none of {STATUSES}")
        if self.measured != (self.seconds is not None):
            raise ValueError(f"{self.name}: {self.status}, and its seconds are {self.seconds}")
        if not self.measured and not self.reason:
            raise ValueError(f"{self.name}: {self.status}, without a reason")
        object.__setattr__(self, "details", _plain(self.details, f"{self.name}: details"))
        needed = GROUPS[self.group].items()
        needed_here = {key: kind for key, kind in needed if self.measured or key in self.details}
        _require(self.details, needed_here, f"{self.name}: details")

    @property
    def measured(self) -> bool:
        return self.status == "measured"


@dataclass(frozen=True)
class Run:
    """One run of `pytest bench`.

    Parameters
    ----------
    date
        When it began: ISO 8601 with seconds, UTC.
    device
        ``type`` ("cpu" or "cuda"), ``name`` for people, ``slug`` for a folder's name, and what is
        known of its memory, caches and clock.
    versions
        Of Python and packages, by name.
    settings
        The options of the run.
    ceilings
        What the device can do, measured in the same run: rates per second by name.
    models
        By name as in the details of records: ``ours``, and ``parameters``, ``published`` (the
        number that its authors state), ``cap`` (most genes of a cell that it takes),
        ``architecture``, ``setting``, ``assumed``.
    records
        Every attempt.

    Raises
    ------
    ValueError
        If two records have one name, or something is missing or not JSON.
    """

    date: str
    device: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    ceilings: dict[str, Any]
    models: dict[str, dict[str, Any]]
    records: list[Record]

    def __post_init__(self) -> None:
        self._moment()
        for name in ("device", "versions", "settings", "ceilings", "models"):
            object.__setattr__(self, name, _plain(getattr(self, name), name))
        _require(self.device, DEVICE, "device")
        if not SLUG.fullmatch(self.device["slug"]):
            raise ValueError(f"device: slug {self.device['slug']!r} is not a folder's name")
        for name, model in self.models.items():
            _require(model, MODEL, f"models: {name}")
        counts = Counter(record.name for record in self.records)
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise ValueError(f"several records are called {', '.join(map(repr, twice))}")
        for record in self.of("runtime", measured=True):
            if record.details["model"] not in self.models:
                raise ValueError(f"{record.name}: its model is not among the models")

    def of(self, group: str, *, measured: bool = False) -> list[Record]:
        """The records of a group, or of them those that are measured."""
        return [
            record
            for record in self.records
            if record.group == group and (record.measured or not measured)
        ]

    def path_in(self, folder: str | Path) -> Path:
        """``folder/<device>/<date>.json``, or ``<date>-2.json`` and so on where that exists."""
        place = Path(folder) / self.device["slug"]
        stem = self._moment().strftime("%Y-%m-%dT%H%M")
        path, count = place / f"{stem}.json", 1
        while path.exists():
            count += 1
            path = place / f"{stem}-{count}.json"
        return path

    def save(self, path: str | Path) -> None:
        """Write the run as JSON, whole or not at all; folders are made.

        Raises
        ------
        InputError
            If it cannot be written there.
        """
        path = Path(path)
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)
        except OSError as error:
            raise _not_writable(path, error) from error

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Read a results file.

        Raises
        ------
        InputError
            If there is none, or it is not JSON, another file, of another version, or damaged.
        """
        content = _read(Path(path))
        try:
            records = [_record(entry) for entry in content.pop("records")]
            return cls(**content, records=records)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise InputError(
                f"{path} is damaged, or was edited: {error}. Measure again with `pytest bench`."
            ) from error

    def _moment(self) -> datetime:
        moment = datetime.fromisoformat(self.date)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def require_writable(folder: str | Path) -> None:
    """Make the folder for results, and find out before the run that nothing can be written there.

    Raises
    ------
    InputError
        If nothing can.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _not_writable(Path(folder), error) from error


def newest(folder: str | Path) -> Path:
    """The results file with the latest date in its name, of any device.

    Raises
    ------
    InputError
        If there is none.
    """
    matches = {path: NAME.fullmatch(path.stem) for path in Path(folder).glob("*/*.json")}
    dated = [(match[1], int(match[2] or 1), path) for path, match in matches.items() if match]
    if not dated:
        raise InputError(
            f"{folder} holds no results (<device>/<date>.json): make some with `pytest bench`, or "
            "name a results file"
        )
    return max(dated)[2]


def _read(path: Path) -> dict[str, Any]:
    """A results file's content, without what marks it as one."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}. Name a results file of `pytest bench`."
        ) from error
    except ValueError as error:  # JSON or UTF-8
        raise InputError(
            f"{path} is not JSON ({error}). Name a results file of `pytest bench`."
        ) from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise InputError(
            f"{path} holds no results of `pytest bench`: it is JSON, but not marked as "
            f"{FORMAT!r}. Name a file under bench/results/<device>/."
        )
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {version}, and this version of cellpatch-fast reads "
            f"{FORMAT_VERSION}: use the one that wrote it, or measure again with `pytest bench`"
        )
    return content


def _record(entry: dict[str, Any]) -> Record:
    seconds = entry.pop("seconds")
    return Record(**entry, seconds=None if seconds is None else Timing(**seconds))


def _plain(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A copy of what JSON can hold, as it will be read again."""
    try:
        copy = json.loads(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} cannot be written as JSON: {error}; found {values}") from error
    if not isinstance(copy, dict):
        raise TypeError(f"{where} must be a dict, found {values}")
    return copy


def _require(values: Mapping[str, Any], needed: Mapping[str, type], where: str) -> None:
    for name, kind in needed.items():
        if type(values.get(name)) is not kind:
            raise ValueError(f"{where}: {name!r} must be a {kind.__name__}, found {values}")
    for name in values.keys() & set(NUMBERS):
        if not isinstance(values[name], int | float | None):
            raise ValueError(f"{where}: {name!r} must be a number or None, found {values[name]!r}")


def _not_writable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path} cannot be written: {error.strerror}. Choose another folder for the results, or "
        "change its permissions."
    )
