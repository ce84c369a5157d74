"""Structures that can be removed from a decoder model: found, masked, chosen, cut out, stored and loaded."""
