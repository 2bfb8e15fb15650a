"""For programs and notebooks: what a command does with flags and a workdir, as functions."""
