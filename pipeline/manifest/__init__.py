"""Manifests: Parquet rows in, shards of image references out."""
