"""Sources of image bytes: files, object stores and HTTP, with what keeps them confined."""
