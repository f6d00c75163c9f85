"""Our own lean models, one file per family; registry.py says which architectures they cover."""
