"""Telemetry: logs, progress, timelines, metrics and traces of a run."""
