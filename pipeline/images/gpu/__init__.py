"""JPEG decoding on an NVIDIA GPU."""
