"""The HTTP service: embeddings and labels from the engine of the jobs, in shared batches."""
