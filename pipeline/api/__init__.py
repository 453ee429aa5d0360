"""For programs and notebooks: embed what is at hand, and ask the dataset that comes of it."""
