"""The engine: pixels to batches, embeddings, labels and shards."""
