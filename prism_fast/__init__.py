"""prism_fast: PRISM post-training of large multimodal models, performance first."""

from unicodedata import category

__version__ = "0.1.0"


class DataError(ValueError):
    """Bad input from outside. The message is one line: place (file:record), field, what was expected, remedy.

    What it quotes of the input can neither break the line nor steer a terminal.

    ``told``: whether another process of the run tells it; None: not known.
    """

    told: bool | None = None

    def __init__(self, message: object = ""):
        super().__init__(printable(" ".join(str(message).split("\n"))))


def printable(text: str) -> str:
    """``text`` with line breaks as they are; control, bidirectional and other invisible characters as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" or category(c) == "Zs" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
