"""Structural criteria, one paper a file: what heads, channels and layers are worth."""
