"""Exported models in a store keyed by fingerprint."""
