"""What a model made here takes along when it is published: code for transformers, and the template of its card.

The two modules run without this package; `interop/export.py` copies them.
"""
