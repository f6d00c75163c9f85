"""Controllers: a file each with a function `build`, and a line each in registry.py."""
