"""One Transformer for every published shape."""
