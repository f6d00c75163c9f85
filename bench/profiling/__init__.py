"""`slipstream profile`: what the steps of a model take on this machine, or by a table of devices.

grid.py says which steps are measured, steps.py runs and times them, measure.py makes the profile, cli.py has the flags.
The fit and the stored object are placement's.
"""
