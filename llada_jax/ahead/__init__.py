"""What a training step will need and cost on a slice that is not there: compiled ahead of time, read from the compiler."""
