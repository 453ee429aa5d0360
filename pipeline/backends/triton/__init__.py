"""Model repositories for NVIDIA Triton, made from exported towers."""
