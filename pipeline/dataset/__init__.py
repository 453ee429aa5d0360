"""Datasets: plan, parts, commits, lease, verification, search and conversion."""
