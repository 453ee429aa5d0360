"""The Python API: embed images and texts, open and search datasets."""
