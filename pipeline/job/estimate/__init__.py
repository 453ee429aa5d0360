"""Estimate of what a job would take, from a few of its batches."""
