"""The blocks of docs/embedding.md, for tests that run them in their hosts' environments."""

import re
import shlex
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "embedding.md").read_text()


def block(section, number):
    """The fenced block of this number in the section that begins with these words."""
    (found,) = (part for part in re.split(r"^## ", PAGE, flags=re.M) if part.startswith(section))
    return re.findall(r"^```\w+\n((?:.*\n)*?)```$", found, re.M)[number]


def filled(code, given):
    """A block with what is the reader's in it put in its place. Each of ``given`` must stand there."""
    for words, value in given.items():
        assert words in code, words
        code = code.replace(words, value)
    return code


def command(text, program):
    """The words after ``program`` in a block of commands, less ``...`` and comments."""
    lines = text.replace("\\\n", " ").splitlines()
    (line,) = (line for line in lines if line.startswith(program))
    return [word for word in shlex.split(line.removeprefix(program), comments=True) if word != "..."]
