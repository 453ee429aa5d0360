"""The dataset: plan, parts and commits."""
