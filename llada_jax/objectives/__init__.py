"""What a model is asked, and the loss of its answers."""
