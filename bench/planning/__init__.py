"""`slipstream bench plan`: what the planner predicts beside what this machine does.

choice.py says which layouts and rates, load.py serves one and puts the workload to it, pace.py tells how fast it is
right before and after, comparison.py sets the two side by side, report.py prints them, session.py goes through all of
it, cli.py has the flags.
"""
