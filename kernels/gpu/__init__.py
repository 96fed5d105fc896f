"""The Triton backend: the encoder on a GPU, compute capability 8.0 and newer."""
