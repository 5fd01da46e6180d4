"""The two errors that a person reads as one line, without a traceback."""


class UserError(Exception):
    """Something that the user gave is wrong. The message says what, where, and what is allowed.

    The command line prints the message and exits with code 2.
    """


class RunFailure(Exception):
    """A run cannot go on: its loss is not finite, or memory ran out. The message says where, and what to change.

    A sweep stores it as a failed row. The command line prints the message and exits with code 1.
    """
