"""Every error that the package raises on purpose.

    AttnRoundError           exit code 1
    ├── ModelError           the input model cannot be read, checked or run
    ├── CalibrationError     samples are missing, unreadable or do not fit the model
    ├── ConfigError          an option is unknown or has an invalid value (exit code 2)
    ├── OutputError          the result cannot be written, or does not load and run
    └── GateError            a gate (``min_sqnr``, ``max_drop``) was missed (exit code 3)

A message is one line that names the node, tensor or option, says what was
found and what was expected, and ends with the remedy.
"""

from __future__ import annotations


class AttnRoundError(Exception):
    """Base of all errors of this package; ``exit_code`` is what the command line returns."""

    exit_code = 1


class ModelError(AttnRoundError):
    """The input model cannot be read, checked or run."""


class CalibrationError(AttnRoundError):
    """Calibration or evaluation samples are missing, unreadable or do not fit the model."""


class ConfigError(AttnRoundError):
    """An option is unknown or has an invalid value."""

    exit_code = 2


class OutputError(AttnRoundError):
    """The result cannot be written, or does not load and run."""


class GateError(AttnRoundError):
    """The quantised model missed a gate that the user set; ``result`` is what the run measured."""

    exit_code = 3
    result: object = None
