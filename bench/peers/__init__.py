"""Models that users would run instead, written in plain PyTorch with random weights."""
