"""The engine of the jobs as a service: pictures and texts over HTTP, answered in shared batches."""
