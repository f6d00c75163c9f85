"""`slipstream bench engine`: how fast one engine steps, with nothing served and no Ray.

cli.py has the flags and the table, measure.py drives the engine, shares.py says where a decode step goes, roofline.py
what it could cost at the least, perplexity.py what quantization costs in quality.
"""
