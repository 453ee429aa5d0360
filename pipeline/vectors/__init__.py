"""What is done with a finished dataset's embeddings: new labels, search, other formats."""
