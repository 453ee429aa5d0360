"""The main job: parts, clusters, the estimate, relabelling and what is said at the end."""
