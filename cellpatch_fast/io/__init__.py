"""What is on disk: AnnData sources, the token store, the embedding store."""
