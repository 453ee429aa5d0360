"""Manifests: Parquet files to shards of image references."""
