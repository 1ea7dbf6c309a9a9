"""The one exception that is for the user, not for a traceback."""


class UserError(Exception):
    """Something only the user can put right. The message says what is wrong and how to mend it.

    Entry points print it and end with exit code 2 (`dino.cli.run`).

    Args:
        alone: only this process knows, so it must speak itself; else the first of all processes does.
    """

    def __init__(self, message: str, alone: bool = False):
        super().__init__(message)
        self.alone = alone
