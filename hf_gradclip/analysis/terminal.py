"""Tables and sentences for a terminal of any width, 80 columns too; needs no library."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence

from hf_gradclip.say import printable

GAP = 2


def table_lines(
    columns: Sequence[str], rows: Iterable[Sequence[str]], width: int, title: str = "", text: tuple[int, ...] = ()
) -> list[str]:
    """A table as lines.

    Where it is wider than the terminal, the first cell of a row and cells of words get lines of their own, so that no
    name is folded into a column.

    Args:
        columns: their names; the first is what a row is about.
        rows: of cells. Names in them are of somebody's model: they are shown as they are, and control nothing.
        width: of the terminal, in characters.
        title: above it.
        text: the places of columns that hold words.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    lines = textwrap.wrap(printable(title), width)
    sizes = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    if sum(sizes) + GAP * (len(sizes) - 1) <= width:
        left = (0, *text)
        shown = [_line(row, sizes, left) for row in (columns, *cells)]
        return ["", *lines, shown[0], "-" * len(shown[0].rstrip()), *shown[1:]]
    numbers = [i for i in range(1, len(columns)) if i not in text]
    heads, sizes = _heads([columns[i] for i in numbers], [[row[i] for i in numbers] for row in cells], width - GAP)
    indent = " " * GAP
    lines = ["", *lines, columns[0], *(indent + _line(head, sizes) for head in heads)]
    lines.append("-" * max(map(len, lines[-len(heads) :])))
    for row in cells:
        lines += _broken(row[0], width)
        lines.append(indent + _line([row[i] for i in numbers], sizes))
        for i in text:
            lines += textwrap.wrap(
                f"{columns[i]}: {row[i]}", width, initial_indent=indent, subsequent_indent=2 * indent
            )
    return lines


def _heads(names: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> tuple[list[list[str]], list[int]]:
    """The names of columns in lines, one or as many words as they have, and the sizes of the columns."""
    sizes = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    if sum(sizes) + GAP * (len(sizes) - 1) <= width:
        return [[*names]], sizes
    words = [name.split() for name in names]
    depth = max(map(len, words))
    heads = [["" if depth - len(word) > line else word[line - depth] for word in words] for line in range(depth)]
    return heads, [max(map(len, column)) for column in zip(*heads, *rows, strict=True)]


def _line(cells: Sequence[str], sizes: Sequence[int], left: Sequence[int] = ()) -> str:
    shown = [
        cell.ljust(size) if i in left else cell.rjust(size)
        for i, (cell, size) in enumerate(zip(cells, sizes, strict=True))
    ]
    return (" " * GAP).join(shown).rstrip()


def _broken(name: str, width: int) -> list[str]:
    """A name in lines, broken after a dot where it is too long."""
    if len(name) <= width:
        return [name]
    place = name.rfind(".", 1, width) + 1 or width
    return [name[:place], *_broken(f"  {name[place:]}", width)]


def show_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", text: tuple[int, ...] = ()
) -> None:
    """Print a table, see `table_lines`, as wide as the terminal is."""
    show(*table_lines(columns, rows, columns_of_terminal(), title, text))


def say(*sentences: str) -> None:
    """Print sentences, each in as many lines as it needs."""
    for sentence in sentences:
        words = printable(sentence)
        indent = "  " if words.startswith("- ") else ""
        show(*(textwrap.wrap(words, columns_of_terminal(), subsequent_indent=indent, break_on_hyphens=False) or [""]))


def show(*lines: str) -> None:
    """Print lines as they are."""
    for line in lines:
        print(line)


def columns_of_terminal() -> int:
    """How wide it is; COLUMNS wins, and what is no terminal has 80."""
    return max(40, shutil.get_terminal_size().columns)
