"""Settings of every test and notebook, however pytest is started: those that the stored outputs were made with.

BOOK_THREADS is tools/elsewhere.py's: the notebooks on more threads than the one that the outputs were made on.

nbval compares outputs exactly; tools/compare.py lets the last digit of a decimal be another processor's.
"""

import os

from nbval.plugin import IPyNbCell

import compare
import execute

os.environ.update(execute.ENVIRONMENT)
os.environ["OMP_NUM_THREADS"] = os.environ.get("BOOK_THREADS", execute.ENVIRONMENT["OMP_NUM_THREADS"])
IPyNbCell.compare_outputs = compare.forgiving(IPyNbCell.compare_outputs)
