"""Checkpoints of the original code.

The original's classes are ``PathFormer`` (pretraining) and ``PathFormer_lp`` (annotation). What
they are is told by the names of their parameters alone (see `original_names`); their package is
never imported.

A checkpoint must hold every tensor of the model that its arguments describe, in the right shape,
and nothing that is unknown. What is known and not part of the model is left out: decoder and
annotation head of a plain encoder, say.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..config import CellPatchConfig, ValueRounding
from ..errors import InputError
from .original_names import original_name
from .storage import empty, listed, misfits

if TYPE_CHECKING:
    from ..genes import GeneVocabulary
    from .encoder import CellPatch

logger = logging.getLogger(__name__)

CellPatchT = TypeVar("CellPatchT", bound="CellPatch")

# Parts of a checkpoint beside the encoder: how their names start there, and here.
OTHER_PARTS = {
    "decoder": ("decoder_", "decoder."),
    "annotation head": ("lp_", "head."),
    "value norm (not used by the released model)": ("count2vector_norm.", "value_norm."),
}


@torch.inference_mode(False)  # weights that a backend may keep tables for, wherever loaded
def import_checkpoint(
    model_class: type[CellPatchT],
    checkpoint: str | os.PathLike[str],
    *,
    args: str | os.PathLike[str] | Mapping[str, Any],
    vocabulary: str | os.PathLike[str] | GeneVocabulary,
    value_rounding: ValueRounding,
    padded_length: int | None,
    **extras: Any,
) -> CellPatchT:
    """See `CellPatch.from_original`; ``extras`` are further arguments of the constructor."""
    from ..genes import GeneVocabulary

    checkpoint = Path(checkpoint)
    state = _read_checkpoint(checkpoint)
    config = _read_config(args, state, value_rounding, padded_length)
    if not isinstance(vocabulary, GeneVocabulary):
        vocabulary = GeneVocabulary.from_original(Path(vocabulary))
    model = empty(model_class, config, vocabulary, checkpoint, **extras)

    originals = {name: original_name(name) for name in model.state_dict()}
    left_out = {
        part: [name for name in state if name.startswith(theirs)]
        for part, (theirs, ours) in OTHER_PARTS.items()
        if not any(name.startswith(ours) for name in originals)
    }
    others = {name for names in left_out.values() for name in names}
    tensors = {name: tensor for name, tensor in state.items() if name not in others}
    shapes = {originals[name]: list(t.shape) for name, t in model.state_dict().items()}
    shapes["pathway_token"].insert(0, 1)  # the original's patches are [1, p, D]
    problems = misfits(shapes, tensors)
    if problems:
        raise InputError(
            f"{checkpoint} does not hold the model that args describe (was it trained with other "
            f"arguments, or is it no {model_class.__name__}?):{listed(problems)}"
        )
    tensors["pathway_token"] = tensors["pathway_token"][0]
    # clones, because tensors of a checkpoint may share memory
    parameters = {name: tensors[original].clone() for name, original in originals.items()}
    model.load_state_dict(parameters, assign=True)
    logger.warning(
        "%s: loaded the %d tensors of the %s; left out: %s",
        checkpoint,
        len(tensors),
        model_class.__name__,
        ", ".join(f"{len(names)} of the {part}" for part, names in left_out.items() if names)
        or "none",
    )
    return model.eval()


def holds_decoder(checkpoint: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint is one of pretraining, whose decoder a `MaskedGeneModel` can take over.

    Annotation checkpoints have a rest of the decoder, which is never used.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    return "decoder_projection.weight" in _read_checkpoint(Path(checkpoint))


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in a ``.pth`` file, without running code that a pickle may hold."""
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}: check the path")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise InputError(
            f"{path} is not a checkpoint of tensors alone"
            + (f": it refers to {refused[1]}" if refused else "")
            + ". Pickled code is never run. If you trust the file's source, load it in the "
            "original's environment and save the state dict alone: "
            'torch.save({"model_state_dict": model.state_dict()}, path)'
        ) from error
    except Exception as error:  # of any type: the bytes of any file are taken as instructions
        raise InputError(f"{path} cannot be read as a PyTorch checkpoint: {error}") from error
    if isinstance(content, dict):
        content = content.get("model_state_dict", content)
    if not isinstance(content, dict) or not content:
        raise InputError(
            f"{path} holds a {type(content).__name__} instead of a state dict: expected names "
            'and tensors, or {"model_state_dict": names and tensors}'
        )
    strangers = [
        str(name)
        for name, value in content.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if strangers:
        raise InputError(
            f"{path} is not a state dict; besides tensors it holds: {', '.join(strangers)}"
        )
    if all(name.startswith("module.") for name in content):  # saved from a data-parallel model
        content = {name.removeprefix("module."): t for name, t in content.items()}
    return dict(content)


def _read_config(
    args: str | os.PathLike[str] | Mapping[str, Any],
    state: Mapping[str, Tensor],
    value_rounding: ValueRounding,
    padded_length: int | None,
) -> CellPatchConfig:
    """The configuration that the original's arguments describe."""
    source = "args"
    if not isinstance(args, Mapping):
        source = os.fspath(args)
        try:
            args = json.loads(Path(args).read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{source} cannot be read as the arguments' JSON: {error}") from error
        if not isinstance(args, Mapping):
            raise InputError(f"{source} must hold a JSON object with the training arguments")
    needed = ("max_gene_num", "n_pathway", "embedding_dim", "n_head", "encoder_self_attn_depth")
    missing = [name for name in needed if name not in args]
    if missing:
        raise InputError(f"{source} lacks the training arguments {', '.join(missing)}")
    if args.get("encoder_cross_attn_depth", 1) != 1:
        raise InputError(
            f"{source}: encoder_cross_attn_depth is {args['encoder_cross_attn_depth']}, but only "
            "models with one cross-attention block are supported"
        )
    if not args.get("log_transform", True):
        raise InputError(
            f"{source}: log_transform is false, but only models of log-transformed values are "
            "supported"
        )
    # no argument tells these
    mlp = state.get("cross_extract_blocks_mlp.0.weight")
    decoder_blocks = CellPatchConfig.decoder_self_attention_blocks
    if "decoder_projection.weight" in state:
        pattern = r"decoder_selfattn_blocks_attn\.\d+\.in_proj_weight"
        decoder_blocks = sum(re.fullmatch(pattern, name) is not None for name in state)
    try:
        return CellPatchConfig(
            max_genes=args["max_gene_num"],
            patches=args["n_pathway"],
            dim=args["embedding_dim"],
            heads=args["n_head"],
            mlp_dim=CellPatchConfig.mlp_dim if mlp is None else len(mlp),
            self_attention_blocks=args["encoder_self_attn_depth"],
            projection_dim=args.get("encoder_projection_dim"),
            decoder_self_attention_blocks=decoder_blocks,
            value_rounding=value_rounding,
            padded_length=padded_length,
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"{source}: {error}") from error
