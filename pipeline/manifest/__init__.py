"""Manifests: Parquet files, shards of rows, image references."""
