"""Live model objects of the original code, made faster in place.

`accelerate` recognises an object by its parameters' names, then makes sure on a few genes that it
computes what the released code does. From then on the object's ``get_mid_embeding`` (the
original's spelling) runs on our kernels, with the object's own parameters.

It works by changing the object's class to a subclass of its own. A method stored on the object
would be simpler, but it would stay bound to the first object: copies (``copy.deepcopy``,
data-parallel replicas) would silently compute with the wrong parameters.
"""

from __future__ import annotations

import functools
import re
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .. import kernels
from ..cells import RaggedCells
from ..errors import InputError
from ..kernels import Encoded, EncoderWeights
from .encoder import gather_weights, run_encoder
from .original_names import original_name

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class _Settings(NamedTuple):
    mask_padding: bool
    backend: str | None


def accelerate(
    model: ModuleT, *, mask_padding: bool = False, backend: str | None = None
) -> ModuleT:
    """Make a live ``PathFormer`` or ``PathFormer_lp`` of the original code encode faster.

    The object's ``get_mid_embeding(count_x, gene_x, output_attentions=False, …)`` is replaced,
    and with it everything that calls it (``forward``). Arguments, results and parameters are
    the original's; parameters are read from the object at each call, so training, loading a
    state dict, copying and moving go on working. Where gradients are recorded, they reach the
    object's parameters. In training mode the original's own method runs, with its dropouts.

    Parameters
    ----------
    model
        The object; it is changed in place. Accelerating it again only changes the settings.
    mask_padding
        The original attends to its padding (gene 0, value 0), which makes a cell's result
        depend on the longest cell of its batch. False: the same here. True: padding is left
        out, as if each cell ran alone; in training mode with the dropout of the object's
        attention.
    backend
        Backend for inference; None for the device's fastest. Where gradients are recorded, it is
        the fastest that can do the job.

    Returns
    -------
    The same object. `restore` undoes the change.

    Raises
    ------
    InputError
        If the object is not one of the original's models: what it lacks is listed, or that it
        computes something else.
    """
    target: Any = model
    if not isinstance(target, _Accelerated):
        _check_names(target)
        _check_results(target)
        original: Any = type(target)
        target.__class__ = _accelerated_class(original)
    target._cellpatch_settings = _Settings(mask_padding, backend)
    return model


def restore(model: ModuleT) -> ModuleT:
    """Undo `accelerate`; an object that was not accelerated stays as it is."""
    target: Any = model
    if isinstance(target, _Accelerated):
        del target._cellpatch_settings
        target.__class__ = _original_class(type(target))
    return model


class _Accelerated:
    """The methods that an accelerated object has in front of its original class."""

    training: bool
    _cellpatch_settings: _Settings

    def get_mid_embeding(
        self,
        count_x: Tensor,
        gene_x: Tensor,
        output_attentions: bool = False,
        project_out: bool = True,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Patch features [B, P, E] of padded cells, values and gene tokens [B, L].

        With ``output_attentions`` also a dict of attention weights, means over the heads:
        ``encoder_cross_extract_blocks`` [B, P, L], ``encoder_self_extract_blocks_<i>``
        [B, P, P].
        """
        settings = self._cellpatch_settings
        if self.training and not settings.mask_padding:
            # only ``PathFormer_lp`` has project_out
            options = {} if project_out else {"project_out": False}
            return super().get_mid_embeding(  # type: ignore[misc]
                count_x, gene_x, output_attentions, **options
            )
        keep = (gene_x != 0) | (count_x != 0)  # [B, L]
        weights = _live_weights(self, project_out)
        cells = RaggedCells.from_padded(gene_x, count_x.to(weights.patches.dtype), keep)
        pads = None if settings.mask_padding else (~keep).sum(1)
        dropout = _attention_dropout(self) if self.training else 0.0
        inference = dropout == 0 and not kernels.needs_gradient(weights, cells.values)
        encoded = run_encoder(
            weights,
            cells,
            pads=pads,
            attention=output_attentions,
            dropout=dropout,
            backend=settings.backend if inference else None,
        )
        if not output_attentions:
            return encoded.features
        return encoded.features, _padded_attention(encoded, keep, pads)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle by the original class: the accelerated one has no importable name."""
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        _, (accelerated, *arguments), *rest = reduced
        return _new_accelerated, (_original_class(accelerated), *arguments), *rest


def _padded_attention(encoded: Encoded, keep: Tensor, pads: Tensor | None) -> dict[str, Tensor]:
    """Attention weights as the original returns them; ``keep`` [B, L] is false at pads."""
    assert encoded.cross_attention is not None
    assert encoded.pad_attention is not None
    assert encoded.self_attention is not None
    cross = encoded.cross_attention.mean(1)  # [n, p]
    if pads is None:
        padded = cross.new_zeros(*keep.shape, cross.shape[-1])  # [B, L, p]
    else:  # the pads of a cell share their attention equally
        each = encoded.pad_attention.mean(1) / pads.clamp(min=1)[:, None]  # [B, p]
        padded = each[:, None].expand(-1, keep.shape[1], -1)
    padded = padded.masked_scatter(keep[..., None], cross)
    attention = {"encoder_cross_extract_blocks": padded.transpose(1, 2)}
    for i, block in enumerate(encoded.self_attention):
        attention[f"encoder_self_extract_blocks_{i}"] = block.mean(1)
    return attention


@functools.cache
def _accelerated_class(original: type) -> type:
    """The subclass of ``original`` whose ``get_mid_embeding`` is ours."""
    return type(original.__name__, (_Accelerated, original), {"__module__": original.__module__})


def _original_class(accelerated: type) -> Any:
    return accelerated.__bases__[1]


def _new_accelerated(original: type, *arguments: Any) -> Any:
    accelerated = _accelerated_class(original)
    return accelerated.__new__(accelerated, *arguments)


def _check_names(model: nn.Module) -> None:
    """Refuse an object that lacks a parameter or the method of the original's models."""
    names = {name for name, _ in model.named_parameters()}
    indices = (re.match(r"self_extract_blocks_\w+\.(\d+)\.", name) for name in names)
    blocks = 1 + max((int(index[1]) for index in indices if index), default=-1)
    needed: list[str] = []

    def need(name: str) -> Tensor:
        needed.append(original_name(name))
        return torch.empty(1, 1)  # stands in for the parameter

    projected = "encoder_projection.weight" in names
    gather_weights(need, heads=1, self_blocks=blocks, binned=False, projected=projected)
    missing = [name for name in needed if name not in names]
    if not callable(getattr(model, "get_mid_embeding", None)):
        missing.append("get_mid_embeding()")
    if missing:
        wrapped = isinstance(getattr(model, "module", None), nn.Module)
        raise InputError(
            f"{type(model).__name__} is not a PathFormer or PathFormer_lp of the original code; "
            f"it lacks {', '.join(missing)}"
            + (". It wraps another module: pass its .module" if wrapped else "")
        )


def _check_results(model: Any) -> None:
    """Compare on three genes: a relative that shares the names may compute something else."""
    weights = _live_weights(model, project_out=True)
    device, dtype = weights.patches.device, weights.patches.dtype
    genes = torch.arange(3, device=device).clamp(max=len(weights.genes) - 1)
    values = torch.arange(3, device=device, dtype=dtype)
    cells = RaggedCells(torch.tensor([0, 3], device=device), genes, values)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            theirs = model.get_mid_embeding(values[None], genes[None])
    finally:
        for module in training:
            module.training = True
    with torch.no_grad():
        ours = run_encoder(
            weights, cells, pads=None, attention=False, dropout=0.0, backend="reference"
        ).features
    if theirs.shape != ours.shape or not (
        (theirs - ours).norm() <= theirs.norm() * torch.finfo(dtype).eps ** 0.5
    ):
        raise InputError(
            f"{type(model).__name__} has the parameters of the original's models, but its "
            "get_mid_embeding computes something else than the released code: it cannot be "
            "accelerated"
        )


def _live_weights(model: Any, project_out: bool) -> EncoderWeights:
    """The object's own parameters, as the kernels take them."""

    def tensor(name: str) -> Tensor:
        parameter: Tensor = attrgetter(original_name(name))(model)
        return parameter[0] if name == "patches" else parameter  # theirs are [1, p, D]

    return gather_weights(
        tensor,
        heads=model.cross_extract_blocks_attn.num_heads,
        self_blocks=len(model.self_extract_blocks_attn),
        binned=False,
        projected=project_out and hasattr(getattr(model, "encoder_projection", None), "weight"),
    )


def _attention_dropout(model: Any) -> float:
    embedding_dropout = getattr(getattr(model, "emb_dropout", None), "p", 0.0)
    if embedding_dropout > 0:
        raise InputError(
            f"emb_dropout is {embedding_dropout}: training with mask_padding=True supports "
            "dropout on the attention weights only. Set model.emb_dropout.p = 0, or accelerate "
            "with mask_padding=False"
        )
    return float(model.cross_extract_blocks_attn.dropout)
