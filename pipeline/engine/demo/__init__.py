"""The demo: rendered scenes and the small CLIP that was trained on them."""
