"""Smaller KV for slow links, piece by piece. All codecs but `none` lose something; how much is what `slipstream bench
transfer --quality` measures.

base.py says what a codec is and how an encoded piece is framed; registry.py has them all. choice.py says which one is
worth it, by how fast a link is (bandwidth.py) and how fast the codecs are here (speeds.py); policy.py asks it where the
operator has left it to us.
"""
