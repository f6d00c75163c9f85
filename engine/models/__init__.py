"""Our own layers, one file per family; registry.py says which architecture is which."""
