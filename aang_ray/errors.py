"""The two ways in which things go wrong that a person should read about in one line."""


class UserError(Exception):
    """Something the user gave is wrong: the message says what, where, and what is allowed.

    Entry points print the message alone, without a traceback, and exit with code 2.
    """


class RunFailure(Exception):
    """A run cannot go on (non-finite loss, out of memory): the message says where and what to change.

    It becomes a failed row in the store. Entry points print it and exit with code 1.
    """
