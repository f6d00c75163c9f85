"""`slipstream bench speculation`: what drafts are worth, on one engine in this process, without Ray.

cli.py has the flags, questions.py reads what is asked, entries.py what is measured, arms.py answers, with speculation
and without, measure.py pairs the answers, report.py is the arithmetic, step_times.py times verification alone, table.py
and plot.py show the result.
"""
