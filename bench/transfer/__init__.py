"""`slipstream bench transfer`: what handing over KV costs.

cli.py has the flags and the tables. Speed: rates.py has a process that lends KV (lender.py) and takes it by every
transport, beside bare loops (baselines.py, gloo_loop.py); over_link.py does so between two hosts (links.py); gap.py
asks servers what a hand-off adds. quality.py measures what codecs cost in quality, on a model (subject.py).
"""
