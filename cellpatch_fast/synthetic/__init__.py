"""Generated cells: as many as wanted, with the gene frequencies and depths of real ones."""
