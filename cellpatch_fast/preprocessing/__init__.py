"""From a matrix to ragged cells: what it holds, counts to tokens, masking."""
