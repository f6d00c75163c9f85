"""Our own lean models; registry.py says which architectures they cover, and how those differ."""
