"""What a job would take: a few batches of it are measured, and nothing is written to the output."""
