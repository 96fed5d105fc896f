"""Numbers in, pictures and pages out: what `cellpatch_fast.pl` and reports draw with."""
