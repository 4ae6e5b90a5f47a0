"""Settings of every test and notebook, however pytest is started: those that the stored outputs were made with."""

import os

import execute

os.environ.update(execute.ENVIRONMENT)
