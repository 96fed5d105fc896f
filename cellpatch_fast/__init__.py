"""cellpatch-fast."""
