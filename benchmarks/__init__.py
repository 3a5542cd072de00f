"""The benchmark: `python -m benchmarks`. Every row against torch, in one run, with floors that must be met.

To add a row, add a `Case` to the list in `cases.py`, or of the training loop in `training.py`: what it is
called, a function that builds its contenders (each a call to be timed, and a check of what it returned), and
the goals it has to meet. All else follows: the table, the JSON, the picture and the test that runs every row
at tiny sizes.
"""
