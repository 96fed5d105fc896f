"""The model directory: ``config.json``, ``model.safetensors``, ``vocabulary.json``.

An annotator's has ``classes.json`` as well. Every model is an encoder with or without more (a
decoder, an annotation head): the tensors of the encoder have the same names in all of them, so any
directory can be loaded as a plain encoder.

A directory is complete when it has its ``config.json``: everything is first written beside it,
then moved in with ``config.json`` last (`saving`), so a save that is killed or runs out of disk
leaves the old model, or one that loading refuses until the next save has put it in order. A
training run that begins anew in a directory marks it first, and its old model is refused from that
moment. Nothing in a directory can hold code. Loading
checks every tensor against what the configuration describes and reports all that do not fit,
draws no random numbers, and keeps the weights' dtype, so what was saved comes back bit for bit.

The Hugging Face Hub's mixin provides the interface (`save_pretrained`, `from_pretrained`,
`push_to_hub`); its own loading is replaced, because it accepts missing tensors and pickles.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..config import CellPatchConfig
from ..errors import InputError
from .saving import replace_together, waiting

if TYPE_CHECKING:
    from ..genes import GeneVocabulary

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
VOCABULARY = "vocabulary.json"
CLASSES = "classes.json"
FILES = (CONFIG, WEIGHTS, VOCABULARY)
ORDER = (WEIGHTS, VOCABULARY, CLASSES, CONFIG)  # in which they are moved in
RUN, RUN_BEGUN = "training.json", "training.begun.json"  # of a training run; while it is set up
PARTS = ("decoder.", "head.", "linear.")  # how the names of tensors beyond the encoder's start

ModelT = TypeVar("ModelT", bound="StoredModel")


class StoredModel(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="cellpatch-fast",
    tags=["single-cell", "transcriptomics"],
):
    """A module that is saved in a model directory.

    A subclass is constructed from a configuration and a vocabulary, and keeps both. One that needs
    more says which file holds it (`_extra_files`) and reads it (`_read_extras`).
    """

    config: CellPatchConfig
    vocabulary: GeneVocabulary
    _own_parts: tuple[str, ...] = ()  # those of `PARTS` that the model has
    _extra_files: tuple[str, ...] = ()

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        *,
        config: None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write the model directory, replacing a model that is there.

        Parameters
        ----------
        save_directory
            Directory to write; made where missing. Other files in it stay.
        config, model_card_kwargs
            Part of the mixin's interface. The configuration is the model's own, and no model
            card is written, so these must be left at None.
        repo_id, push_to_hub, **push_to_hub_kwargs
            Also upload it to the Hugging Face Hub; ``repo_id`` defaults to the directory's name.

        Returns
        -------
        str or None
            Address of the upload, None without one.

        Raises
        ------
        InputError
            If ``save_directory`` is a file.
        OSError
            If it cannot be written, with what was there before untouched; or files cannot be
            moved in, then the next save does so.
        """
        if config is not None or model_card_kwargs:
            raise ValueError(
                "config and model_card_kwargs are not supported: a model saves its own "
                "configuration and no model card"
            )
        directory = Path(save_directory)
        if directory.exists() and not directory.is_dir():
            raise InputError(f"{directory} is a file: choose a directory to save the model in")
        replace_together(directory, ORDER, self._save_pretrained)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or directory.name, **push_to_hub_kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the model's files into an empty directory. A subclass may add its own."""
        (save_directory / CONFIG).write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")
        self.vocabulary.save(save_directory / VOCABULARY)
        # as bytes: safetensors' own writer makes files that other users cannot read
        (save_directory / WEIGHTS).write_bytes(save_tensors(_state(self)))

    @classmethod
    @torch.inference_mode(False)  # weights that a backend may keep tables for, wherever loaded
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        map_location: str | torch.device = "cpu",
    ) -> Self:
        """Load a model directory, or fetch one from the Hugging Face Hub.

        Parameters
        ----------
        pretrained_model_name_or_path
            A directory, or the name of a repository on the Hub (``"owner/name"``).
        force_download, token, cache_dir, local_files_only, revision
            How to fetch from the Hub; see ``huggingface_hub.snapshot_download``.
        map_location
            Device to put the model on.

        Returns
        -------
        The model, in evaluation mode.

        Raises
        ------
        InputError
            If it is no complete model directory, was written by a newer version, or its tensors
            are not those of its configuration (all are listed).
        """
        directory = Path(pretrained_model_name_or_path)
        if directory.is_file():
            raise InputError(
                f"{directory} is a file, but a model is a directory with {', '.join(FILES)} (a "
                "checkpoint of the original code is read by CellPatch.from_original)"
            )
        if not directory.is_dir():
            directory = _fetch(
                os.fspath(pretrained_model_name_or_path),
                force_download=force_download,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                revision=revision,
            )
        return cls._load(directory).to(map_location).eval()

    @classmethod
    def _load(cls, directory: Path) -> Self:
        _require_complete(directory)
        missing = [name for name in cls._extra_files if not (directory / name).is_file()]
        if missing:
            raise InputError(
                f"{directory} holds a model, but no {cls.__name__}: {', '.join(missing)} is missing"
            )
        from ..genes import GeneVocabulary

        config = _read_config(directory / CONFIG)
        vocabulary = GeneVocabulary.load(directory / VOCABULARY)
        others = tuple(set(PARTS) - set(cls._own_parts))
        state = {
            name: tensor
            for name, tensor in _read_tensors(directory / WEIGHTS).items()
            if not name.startswith(others)
        }
        model = empty(cls, config, vocabulary, directory, **cls._read_extras(directory))
        problems = misfits({name: t.shape for name, t in model.state_dict().items()}, state)
        if problems:
            raise InputError(
                f"{directory / WEIGHTS} does not hold the tensors of the model in {CONFIG}:"
                + listed(problems)
            )
        model.load_state_dict(state, assign=True)
        return model

    @classmethod
    def _read_extras(cls, directory: Path) -> dict[str, Any]:
        """Further arguments of the constructor."""
        return {}


def local_directory(name: str | os.PathLike[str]) -> Path:
    """A model directory on this machine: ``name`` itself, or a copy of that repository of the Hub.

    Raises
    ------
    InputError
        If there is neither.
    """
    return Path(name) if Path(name).exists() else _fetch(os.fspath(name))


def parts_of(directory: Path) -> set[str]:
    """Which of `PARTS` the model in a directory has; none where there is no readable model."""
    try:
        with safe_open(directory / WEIGHTS, framework="pt") as tensors:
            names = list(tensors.keys())
    except (OSError, SafetensorError):
        return set()  # loading says what is wrong with it
    return {part for part in PARTS if any(name.startswith(part) for name in names)}


def fingerprint(model: StoredModel, *, whole: bool = False) -> str:
    """SHA-256 over configuration, vocabulary and the encoder's weights, in hexadecimal.

    Equal for models that embed equally, wherever and whenever they were saved and loaded; any
    changed setting, gene or bit of a weight of the encoder (``whole``: of any weight) changes it.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(dataclasses.asdict(model.config), sort_keys=True).encode())
    digest.update(model.vocabulary.fingerprint.encode())
    for name, tensor in sorted(_state(model).items()):
        if name.startswith(PARTS) and not whole:
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def empty(
    model_class: type[ModelT],
    config: CellPatchConfig,
    vocabulary: GeneVocabulary,
    source: Path,
    **extras: Any,
) -> ModelT:
    """A model without memory for its weights, to be filled by ``load_state_dict(assign=True)``.

    No weights are drawn only to be overwritten, and the global random state stays as it is.
    """
    try:
        with torch.device("meta"), _Undrawn():
            return model_class(config, vocabulary, **extras)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


class _Undrawn(TorchFunctionMode):
    """Draws no normal random numbers: without memory for them, PyTorch imports its compiler.

    That took two seconds in every new process that loads a model.
    """

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        if function is torch.nn.init.normal_:
            return keywords["tensor"]  # as PyTorch passes it
        return function(*arguments, **(keywords or {}))


def misfits(expected: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor]) -> list[str]:
    """Everything that keeps ``found`` from being a state dict of the ``expected`` shapes."""
    problems = [f"{name}: missing" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"{name}: unexpected")
        elif tensor.shape != torch.Size(expected[name]):
            problems.append(
                f"{name}: has shape {list(tensor.shape)}, expected {list(expected[name])}"
            )
        elif not tensor.is_floating_point():
            problems.append(f"{name}: has dtype {tensor.dtype}, expected floating point")
        elif not tensor.isfinite().all():
            problems.append(f"{name}: holds NaN or infinite values")
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    if not problems and len(dtypes) > 1:
        problems.append(f"all tensors: expected one dtype, found {', '.join(sorted(dtypes))}")
    return problems


def listed(problems: Sequence[str]) -> str:
    """One problem per line, to end a message with."""
    return "".join(f"\n  {problem}" for problem in problems)


def _state(model: Any) -> dict[str, Tensor]:
    """The state dict on the CPU, contiguous."""
    return {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}


def _require_complete(directory: Path) -> None:
    """Refuse a directory without a whole model of its own."""
    run_goes_on = "the command that began it, without --overwrite, goes on with it"
    if (directory / RUN_BEGUN).exists():
        raise InputError(
            f"{directory} is the folder of a training run that was just begun, and has no model "
            f"yet: {run_goes_on}"
        )
    missing = [name for name in FILES if not (directory / name).is_file()]
    if not missing:
        return
    advice = "Save the model again, or check the path"
    if (directory / RUN).is_file():
        advice = f"It is the folder of a training run that is not finished: {run_goes_on}"
    elif rest := waiting(directory):
        advice = f"It was interrupted while it was saved: move the files in {rest} there"
    raise InputError(
        f"{directory} is not a complete model directory: {', '.join(missing)} is missing. {advice}"
    )


def _read_config(path: Path) -> CellPatchConfig:
    try:
        return CellPatchConfig.from_dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise InputError(f"{path}: {error}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_tensors(path.read_bytes())
    except SafetensorError as error:
        raise InputError(
            f"{path} is damaged ({error}): save or download the model again"
        ) from error


def _fetch(name: str, **options: Any) -> Path:
    """Download a model directory from the Hugging Face Hub, all files of one revision."""
    try:
        return Path(snapshot_download(name, allow_patterns=[*FILES, CLASSES], **options))
    except HFValidationError as error:  # no repository can have such a name: it is a path
        raise InputError(f"there is no model directory {name}: check the path") from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise InputError(
            f"there is no model directory {name}, and it could not be fetched from the Hugging "
            f"Face Hub: {error}"
        ) from error
