"""What a user can get wrong, as exceptions with an exit code.

A UserError is one sentence that says what was found, what was needed and how to go on; the command line
prints it without a traceback. Any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """Something outside the program stands in the way: model, machine, missing package. Exit code 1."""

    exit_code = 1


class ConfigError(UserError):
    """The command line or the YAML asks for something that cannot be done. Exit code 2."""

    exit_code = 2


class StoppedError(UserError):
    """A signal ended the run, and a checkpoint was saved. Exit code 130."""

    exit_code = 130


class DataError(UserError):
    """A dataset is missing, empty or not what its type needs. Exit code 3."""

    exit_code = 3


class HubError(DataError):
    """The Hugging Face hub did not give a dataset."""
