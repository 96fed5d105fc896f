"""Spatial domains: graphs of spots, STAGATE with CellPatch's features, clustering."""
