"""Exporters: other forms of a finished model, one form a file, and the clients that prove them."""
