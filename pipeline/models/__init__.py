"""Models: a checkpoint in; towers, text banks and labels out."""
