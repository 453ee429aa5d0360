"""Models: checkpoints, image and text towers, text features and labels."""
