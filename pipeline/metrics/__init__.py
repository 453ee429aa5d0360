"""What monitors are told of a run: Prometheus' files and gateways, OpenTelemetry's spans."""
