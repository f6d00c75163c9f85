"""Speculative decoding: token trees, how they are proposed and verified, and how large they are worth making.

protocols.py says what the parts are, tree.py what a draft is and rounds.py what passes between the parts. drafters/,
rules/ and controllers/ have one file per method and a registry each.
"""
