"""Schemas, ranges, validation and composition of the config."""
