"""Run configs, one file each; the head of each shows its command."""
