"""The compiled step, the loop around it, and what keeps a run alive."""
