"""HTTP service for embeddings and labels, with dynamic batching."""
