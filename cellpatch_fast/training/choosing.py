"""What a run is trained with where the user has not said it: by the number of cells.

The paper's settings are for millions of cells; what some thousand need is another recipe (see
`FinetuningSettings.for_few_cells`). Which one a run takes is decided here, and said in one line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..config import CellPatchConfig, Reading
from ..errors import InputError
from ..io.sources.source import open_source
from ..io.stores.tokens import TokenStore, is_token_store
from ..loading.loader import listed_inputs
from .settings import FinetuningSettings, PretrainingSettings, TrainingSettings

FEW = 20_000  # cells below this are few: the paper's smallest data have three times as many

SettingsT = TypeVar("SettingsT", PretrainingSettings, FinetuningSettings)


@dataclass(frozen=True)
class Choice:
    """Whether a run is one on few cells, and why; ``str()`` says it."""

    few: bool
    reason: str

    def __str__(self) -> str:
        kind = "settings for few cells" if self.few else "the paper's settings"
        return f"{kind}: {self.reason}"


def choose(
    data: Any,
    few_cells: bool | None,
    settings: TrainingSettings | Mapping[str, Any] | None,
    reading: Reading,
) -> Choice:
    """Decide by what was asked for, else by the number of cells of the inputs.

    Raises
    ------
    InputError
        If an input cannot be opened, or ``few_cells`` comes with settings that are complete.
    """
    if isinstance(settings, TrainingSettings):
        if few_cells is not None:
            raise InputError(
                "few_cells chooses the defaults of settings, but complete settings were given: "
                "leave few_cells out, or give a mapping of the settings that shall be others"
            )
        return Choice(settings.spectral, "as they were given")
    if few_cells is not None:
        return Choice(few_cells, "as asked for")
    cells = sum(_cells_of(each, reading) for each in listed_inputs(data))
    few = cells < FEW
    fewer, option = ("fewer than", "--no-few-cells") if few else ("at least", "--few-cells")
    return Choice(
        few,
        f"there are {cells:,} cells, {fewer} {FEW:,} ({option}, few_cells={not few}: the others)",
    )


def new_config(
    data: Any, choice: Choice, config: CellPatchConfig | Mapping[str, Any] | None
) -> CellPatchConfig:
    """The configuration of a new model.

    What is not given has the defaults of `choice`; token stores among the inputs say how values
    were prepared.

    Raises
    ------
    InputError
        If fields are unknown or make no sense.
    """
    if isinstance(config, CellPatchConfig):
        return config
    fields = (CellPatchConfig.for_few_cells() if choice.few else CellPatchConfig()).to_dict()
    for each in listed_inputs(data):
        if isinstance(each, str | Path) and is_token_store(each):
            with TokenStore(each) as store:
                fields |= dataclasses.asdict(store.preprocessing)
    try:
        return CellPatchConfig.from_dict(fields | dict(config or {}))
    except (ValueError, TypeError) as error:
        raise InputError(f"the model's configuration: {error}") from error


def complete(
    kind: type[SettingsT],
    settings: SettingsT | Mapping[str, Any] | None,
    few: bool,
    cells: int | None,
) -> SettingsT:
    """All settings of a run; those given come before defaults.

    Parameters
    ----------
    kind
        Of training.
    settings, few
        What was given, and the defaults to take for the rest.
    cells
        Training cells, on which some defaults depend; None while they are not known.

    Raises
    ------
    InputError
        If there are unknown settings, or values that make no sense.
    """
    if isinstance(settings, TrainingSettings):
        return settings
    given = dict(settings or {})
    defaults = kind.for_few_cells() if few else kind()
    kind.from_dict(defaults.to_dict() | given)  # says what is wrong
    return kind.for_few_cells(cells, **given) if few else kind(**given)


def _cells_of(data: Any, reading: Reading) -> int:
    if isinstance(data, str | Path) and is_token_store(data):
        with TokenStore(data) as store:
            return store.n_cells
    with open_source(data, layer=reading.layer, use_raw=reading.use_raw) as source:
        return source.n_cells
