"""`slipstream profile`: what the steps of a model take on this machine.

steps.py runs and times the steps of a grid, measure.py makes the profile, neighbours.py are workers that
compute beside it, cli.py has the flags. The grid, the fit and
the stored object are placement's.
"""
