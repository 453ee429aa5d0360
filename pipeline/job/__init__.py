"""Jobs: the main job, its parts and clusters, the estimate, relabelling."""
