"""Offline batch inference for CLIP-style models: images in, embeddings and labels out."""

__version__ = "0.1.0"
