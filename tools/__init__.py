"""Command-line tools; `python -m llada_jax.tools.NAME` where the package is installed."""
