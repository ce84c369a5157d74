"""Stages with a loop of their own, one paper a file."""
