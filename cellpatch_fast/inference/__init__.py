"""A model over a stream of cells: features, labels, and how good the labels are."""
