"""A console on which untrusted text does no harm: every string is printed as plain text on one line.

Names, paths and fields of strangers' files reach a terminal in many ways: lines, table cells, titles, progress bars.
All output goes through this console. It cleans every string it is given (:func:`smark_jax._foreign.clean`) and again
everything it is about to write, so no caller can forget to. Styles come only from :class:`rich.text.Text`, never from
markup.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import rich.box
import rich.cells
import rich.console
import rich.progress
import rich.segment
import rich.status
import rich.table
import rich.text

from smark_jax import _foreign

Styled = tuple[str, str]
"""A text and its style."""

_SECONDS_PER_LOG_LINE = 20
_LEAST = 10  # a line is never folded to fewer characters
_LONGEST_WORD = 24  # a text column is at least as wide as its longest word, up to this; longer words are broken


class Console(rich.console.Console):
    """A terminal, or a file or pipe in its place."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, *, style: Any = "", **options: Any) -> rich.text.Text:
        """Turns a string into plain text on one line; Rich calls this for all printed strings, table cells included."""
        plain = rich.text.Text(_foreign.clean(text), style=style)
        plain.justify, plain.overflow = options.get("justify"), options.get("overflow")
        return plain

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[rich.segment.Segment]:
        """Cleans every segment about to be written, except Rich's own control codes, which move the cursor."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=_foreign.blanked(segment.text))

    def status(self, status: Any, **options: Any) -> rich.status.Status:
        """A status line with a spinner for the current step."""
        return _Status(self.plain(status), console=self, **options)

    def plain(self, text: str | Styled) -> rich.text.Text:
        """Turns a string, with or without a style, into a Rich text, in which Rich looks for no markup."""
        return self.render_str(text) if isinstance(text, str) else self.render_str(text[0], style=text[1])

    @property
    def room(self) -> int | None:
        """The width in columns: ``COLUMNS`` if set, else the terminal's; None for a pipe or file, which has none."""
        said = self._environ.get("COLUMNS", "")
        return int(said) if said.isdigit() and int(said) else self.width if self.is_terminal else None

    def say(self, text: str, *, style: str = "") -> None:
        """Prints one line without wrapping it, so that paths and hashes can be copied whole."""
        self.print(text, style=style, soft_wrap=True)

    def lines(self, text: str, start: Styled = ("", "")) -> None:
        """Prints a message after ``start``; all lines but the first are indented, so none looks like a new message."""
        first, *rest = text.split("\n")
        self._hang(rich.text.Text.assemble(start, _foreign.clean(first)), 2)
        for line in rest:
            self._hang(rich.text.Text(f"  {_foreign.clean(line)}"), 4)

    def item(self, sign: Styled, text: str) -> None:
        """Prints one list item: a sign, then its text. Only signs appear at the left edge."""
        self._hang(rich.text.Text.assemble(sign, "  ", _foreign.clean(text)), len(sign[0]) + 2)

    def _hang(self, text: rich.text.Text, indent: int) -> None:
        """Prints a line with a hanging indent; folded here, since a terminal would continue it at the left edge."""
        if not self.is_terminal:
            self.print(text, soft_wrap=True)
            return
        for place, part in enumerate(text.wrap(self, max(_LEAST, self.width - indent), overflow="fold")):
            self.print(rich.text.Text(" " * indent if place else "").append_text(part), soft_wrap=True)

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[str | Styled]],
        *,
        keep: Sequence[str],
        figures: Sequence[str] = (),
        title: str | None = None,
    ) -> None:
        """Prints a table whose most important column is always complete, however narrow the terminal.

        If there is too little room, columns of text are folded first. Then columns are left out, the least important
        first; a line below the table names them.

        Args:
          columns: the headings, in order.
          rows: one cell per column; a styled cell is a pair of text and style.
          keep: all headings, the most important one first.
          figures: headings of number columns, which are right-aligned and never folded.
          title: printed above the table.
        """
        cells = [[self.plain(cell) for cell in row] for row in rows]
        natural = {name: max(map(_wide, [name, *(row[k].plain for row in cells)])) for k, name in enumerate(columns)}
        words = {
            name: max(map(_wide, " ".join([name, *(row[k].plain for row in cells)]).split()))
            for k, name in enumerate(columns)
        }
        firm = {keep[0], *figures}
        least = {name: width if name in firm else min(words[name], _LONGEST_WORD) for name, width in natural.items()}
        widths = _widths(natural, least, keep, self.room)
        table = rich.table.Table(title=title, title_justify="left", width=sum(widths.values()) + _rules(len(widths)))
        for name in columns:
            if name in widths:
                side = "right" if name in figures else "left"
                table.add_column(name, justify=side, overflow="fold", width=widths[name])
        for row in cells:
            table.add_row(*(cell for name, cell in zip(columns, row, strict=True) if name in widths))
        self.print(table, crop=False)
        missing = [name for name in columns if name not in widths]
        if missing:
            self.say(f"Not shown, for want of room: {', '.join(missing)}.")


def progress(console: Console, *, transient: bool = False) -> rich.progress.Progress:
    """Progress bars; each task has a field ``note``."""
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[note]}", markup=False),
        console=console,
        transient=transient,
    )


def bar(bars: rich.progress.Progress, label: str) -> Callable[..., None]:
    """Makes an ``on_progress(done, total, loss=None)`` that shows a bar, or an occasional line without a terminal."""
    task, printed = bars.add_task(label, total=None, note=""), time.monotonic()

    def on_progress(done: int, total: int, loss: Any = None) -> None:
        nonlocal printed
        note = "" if loss is None else "compiling ..." if math.isnan(loss) else f"loss {float(loss):.3f}"
        bars.update(task, completed=done, total=total, note=note)
        if not bars.console.is_terminal and time.monotonic() - printed > _SECONDS_PER_LOG_LINE:
            printed = time.monotonic()
            bars.console.print(", ".join(filter(None, (f"{label}: {done:,} of {total:,}", note))))

    return on_progress


def _wide(text: str) -> int:
    return rich.cells.cell_len(text)


def _rules(columns: int) -> int:
    """The width that blanks and rules take in a table of so many columns."""
    return 3 * columns + 1


def _widths(natural: dict[str, int], least: dict[str, int], keep: Sequence[str], room: int | None) -> dict[str, int]:
    """The width of each shown column; more important columns get spare room first."""
    if room is None:
        return natural
    shown = list(keep)

    def left(widths: dict[str, int]) -> int:
        return room - sum(widths[name] for name in shown) - _rules(len(shown))

    while len(shown) > 1 and left(least) < 0:
        shown.pop()
    if left(least) < 0:  # even the last one has to be folded
        return {shown[0]: max(1, room - _rules(1))}
    spare, widths = left(least), {}
    for name in shown:
        widths[name] = min(natural[name], least[name] + spare)
        spare -= widths[name] - least[name]
    return widths


class _Status(rich.status.Status):
    """A status line without markup, which Rich's own would interpret."""

    def update(self, status: Any = None, **options: Any) -> None:
        super().update(None if status is None else rich.text.Text(_foreign.clean(status)), **options)
