"""The exceptions of the three packages, at the bottom of the import chain.

MmoptError                 exit 3: could not run, or could not decide
├── InputError             exit 2: bad usage or bad input; also a ValueError
│   └── KernelInputError   a shape, dtype, device or option that an op cannot take
└── CheckFailedError       exit 1: it ran, and what was promised does not hold

Upper packages derive from these. A message says what was wrong, what was expected and what to
do, in that order; the command line prints it as it is, without a traceback.
"""


class MmoptError(Exception):
    """Base of every error that mmopt raises on purpose.

    Attributes:
        exit_code: what the command line exits with when the error reaches it.
    """

    exit_code: int = 3


class InputError(MmoptError, ValueError):
    """What the caller handed over cannot be used."""

    exit_code = 2


class KernelInputError(InputError):
    """An op was called with a shape, dtype, device or option that it cannot take."""


class CheckFailedError(MmoptError):
    """The work ran to its end and what it promised does not hold (parity, placement, gradient)."""

    exit_code = 1


def one_line(error: BaseException, most: int = 300) -> str:
    """What a library's error says, for use within a message of ours."""
    return " ".join(str(error).split())[:most]
