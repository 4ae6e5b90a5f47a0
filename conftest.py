"""Settings of every test and notebook, however pytest is started: those that the stored outputs were made with.

nbval compares outputs exactly; tools/compare.py lets the last digit of a decimal be another processor's.
"""

import os

from nbval.plugin import IPyNbCell

import compare
import execute

os.environ.update(execute.ENVIRONMENT)
IPyNbCell.compare_outputs = compare.forgiving(IPyNbCell.compare_outputs)
