"""The Numba backend: the whole encoder on a CPU, one cell at a time."""
