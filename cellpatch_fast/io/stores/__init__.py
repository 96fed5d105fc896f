"""What is written here: token stores and embedding stores, each shard once."""
