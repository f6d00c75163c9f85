"""Outputs that a grammar constrains: the grammars of a worker, compiled beside its loop, and what each allows next."""
