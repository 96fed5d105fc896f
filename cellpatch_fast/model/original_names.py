"""What the original calls a parameter: for checkpoints (`original`) and live objects (`live`)."""

from __future__ import annotations

import re


def original_name(name: str) -> str:
    """The original's name of a `CellPatch` parameter.

    >>> original_name("self_blocks.1.mlp_norm.bias")
    'self_extract_blocks_mlp_norm.1.bias'
    """
    for ours, theirs in (
        (r"decoder\.expansion\.", "decoder_reverse_projection."),
        (r"decoder\.cross_block\.attention(_norm)?\.", r"decoder_extract_blocks_attn\1."),
        (r"decoder\.cross_block\.mlp(_norm)?\.", r"decoder_extract_blocks_mlp\1."),
        (
            r"decoder\.self_blocks\.(\d+)\.attention(_norm)?\.",
            r"decoder_selfattn_blocks_attn\2.\1.",
        ),
        (r"decoder\.self_blocks\.(\d+)\.mlp(_norm)?\.", r"decoder_selfattn_blocks_mlp\2.\1."),
        (r"decoder\.output\.", "decoder_projection."),
        (r"head\.expansion\.", "lp_linear_probe_0."),
        (r"head\.expansion_norm\.", "lp_norm."),
        (r"head\.first\.", "lp_fc1."),
        (r"head\.second\.", "lp_fc2."),
        (r"head\.output\.", "lp_fc3."),
        (r"gene_embedding\.", "gene2vector."),
        (r"value_embedding\.", "count2vector."),
        (r"patches", "pathway_token"),
        (r"projection\.", "encoder_projection."),
        (r"cross_block\.attention(_norm)?\.", r"cross_extract_blocks_attn\1."),
        (r"cross_block\.mlp(_norm)?\.", r"cross_extract_blocks_mlp\1."),
        (r"self_blocks\.(\d+)\.attention(_norm)?\.", r"self_extract_blocks_attn\2.\1."),
        (r"self_blocks\.(\d+)\.mlp(_norm)?\.", r"self_extract_blocks_mlp\2.\1."),
    ):
        if match := re.match(ours, name):
            return match.expand(theirs) + name[match.end() :]
    raise AssertionError(f"no original name for parameter {name}")
