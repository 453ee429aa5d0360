"""Images: references to bytes, bytes to pixels."""
