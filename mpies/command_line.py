"""What all commands share at the command line: their ends, and their help."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import NoReturn

from mpies.errors import InputError, OrderlyError, show_traceback

INTERRUPTED = 130
EXIT_CODES = """\
exit codes: 0 done; 2 bad input, a line says which; 130 interrupted by Ctrl-C; anything else is a failure"""
EXIT_CODES_OF_RUNS = """\
exit codes: 0 done; 2 bad input, a line says which; 75 stopped early by a signal or the time limit, the same \
command goes on; 130 interrupted by Ctrl-C before it began; anything else is a failure"""


def conduct_alone(main: Callable[[list[str]], int], arguments: list[str], *, quiet: bool = False) -> int:
    """The status of a command without ranks; what ends it is told in a line, unless `quiet`."""
    try:
        with reader_may_leave():
            return main(arguments)
        return 0  # the reader has left
    except OrderlyError as error:
        show_traceback(error)
        if not quiet:
            tell(str(error))
        return error.status
    except KeyboardInterrupt:
        return INTERRUPTED


def tell(message: str) -> None:
    """What is wrong, on stderr: a line of the program's for each line of the message."""
    for line in message.splitlines():
        print(f"mpies: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """Whoever reads what is printed within may have had enough (`| head -1`): that is no error."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # What is left must not fail when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def width() -> int:
    """Columns of the terminal, or of COLUMNS; 80 where there is none."""
    return max(shutil.get_terminal_size().columns, 40)


def fill(text: str, columns: int | None = None) -> str:
    """The text with its paragraphs filled to so many columns (the terminal's); indented lines stay."""
    columns = columns or width()
    filled: list[str] = []
    paragraph: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line and not line.startswith(" "):
            paragraph.append(line)
            continue
        filled += textwrap.wrap(" ".join(paragraph), columns, break_on_hyphens=False)
        paragraph = []
        filled.append(line)
    return "\n".join(filled[:-1])


class Parser(argparse.ArgumentParser):
    """What cannot be is a line, as all bad input is, and not argparse's usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help shows what there is")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Paragraphs are filled to the terminal's width, examples (indented lines) stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return fill(text, width)
