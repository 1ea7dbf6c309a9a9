"""The one exception that is for the user, not for a traceback."""

# Letters of a message and its parts; what comes from outside, such as a path, may have any number.
LONGEST_WORD, LONGEST_LINE, LONGEST_MESSAGE = 500, 3000, 20_000


class UserError(Exception):
    """Something only the user can put right. The message says what is wrong and how to mend it.

    Entry points print it and end with exit code 2 (`dino.cli.run`).

    Args:
        message: `shortened`, as it may hold anything that was found.
        alone: only this process knows, so it must speak itself; else the first of all processes does.
    """

    def __init__(self, message: str, alone: bool = False):
        super().__init__(shortened(message))
        self.alone = alone


def shortened(text: str) -> str:
    """A message in which words and lines too long to be read, such as paths, lack their middle; as it does itself."""
    lines = []
    for line in text.split("\n"):
        words = [_without_middle(word, LONGEST_WORD) for word in line.split(" ")]
        lines.append(_without_middle(" ".join(words), LONGEST_LINE))
    return _without_middle("\n".join(lines), LONGEST_MESSAGE)


def _without_middle(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    end = longest // 2 - 10
    return f"{text[:end]}[… {len(text) - 2 * end:,} letters …]{text[-end:]}"
