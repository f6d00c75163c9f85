"""Verify rules: a file each with a function `verify`, and a line each in registry.py that says what it is good for."""
