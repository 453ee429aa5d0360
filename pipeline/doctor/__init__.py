"""Checks of a machine, an installation and the places of a job."""
