"""Models that we have no layers for, run by their classes in Transformers with our paged attention in place of theirs.
Slower than our own layers, on one device, and for those classes only that leave attention to an interface."""
