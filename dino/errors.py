"""The one exception that is for the user, not for a traceback."""


class UserError(Exception):
    """Something only the user can put right. The message says what is wrong and how to mend it.

    Entry points print it and end with exit code 2 (`dino.cli.run`).
    """
