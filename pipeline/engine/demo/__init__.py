"""The demo: rendered scenes and a small CLIP model trained on them."""
