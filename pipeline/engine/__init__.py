"""The engine: batches from images, embeddings and labels from batches, shards from rows."""
