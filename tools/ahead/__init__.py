"""What a training step needs and costs on a slice that is not there, as the compiler sees it."""
