"""The one exception that means: the user's input is wrong, and here is what to do about it."""


class UserError(ValueError):
    """Bad input from outside: a config, a file, a data row, a model directory.

    The message says what is wrong, what was got, what was expected and what to do.
    The command line prints it alone, without a traceback, and exits with code 2.
    """
