"""Heads: small networks that read the target's hidden states and draft what it says next, and their training."""
