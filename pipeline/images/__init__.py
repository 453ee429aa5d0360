"""Images: references in, pixels and batches out."""
