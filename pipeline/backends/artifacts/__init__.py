"""Exported models in a store with one folder for each fingerprint."""
