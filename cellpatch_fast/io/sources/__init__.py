"""Cells x genes matrices as others store them: AnnData files, 10x files, objects in memory."""
