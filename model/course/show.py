"""Shows code, differences, tables, and the reader's predictions beside what was measured."""

import difflib
import inspect
import math
import sys
import textwrap
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

from IPython.display import Markdown
from tqdm import tqdm


def code(thing: Any) -> Markdown:
    """The source of a module, class or function, as it stands in the repository."""
    return Markdown(f"```python\n{textwrap.dedent(inspect.getsource(thing)).strip()}\n```")


def diff(old: ModuleType, new: ModuleType, folded: type | None = None) -> Markdown:
    """The changes that lead from one module's source to the other's.

    folded: a class of the old module, of which only the first line is shown.
    """
    before, after = (inspect.getsource(module) for module in (old, new))
    if folded:
        body = inspect.getsource(folded)
        before = before.replace(body, f"{body.splitlines()[0]} ...\n")
    names = [Path(module.__file__).name for module in (old, new)]
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), *names, lineterm="", n=2)
    return Markdown("```diff\n" + "\n".join(lines) + "\n```")


def table(rows: Iterable[dict[str, Any]]) -> Markdown:
    """A table of rows that all have the same keys, which become its head.

    Floats are rounded to three significant digits.
    """
    rows = list(rows)
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(map(rounded, row.values())) + " |" for row in rows]
    return Markdown("\n".join(lines))


def rounded(value: Any) -> str:
    """A float with three significant digits, in decimal notation; anything else as `str` has it."""
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    return format(Decimal(f"{value:.3g}"), "f")


def interval(row: dict[str, Any], name: str) -> str:
    """A quantity's interval in a row of loadtest.summary, in words: "41 to 43.5"."""
    return f"{rounded(row[f'{name}_low'])} to {rounded(row[f'{name}_high'])}"


def compare(prediction: Any, measured: Any, unit: str = "", how: str = "measured") -> None:
    """Print the reader's prediction beside what was found.

    prediction: None where the reader has made none. how: it was found.
    """
    said = "no prediction yet" if prediction is None else f"you predicted {prediction}"
    print(f"{said}; {how}: {rounded(measured)} {unit}".strip())


def claim(holds: bool, sentence: str) -> None:
    """Say so where a claim about speed does not hold here; the notebook goes on.

    A machine that does other work too, or another kind of machine, may well give other numbers.
    What is counted (failed or wrong requests, say) is asserted instead.
    """
    if not holds:
        print(f"Not so on this machine, this time: {sentence}.")
        print("If something else keeps it busy, run the notebook again when that is over.")


def progress(steps: Iterable, what: str) -> Iterable:
    """The same steps, with a line that counts them while the reader waits."""
    return tqdm(steps, desc=what, bar_format="{desc}: {n_fmt} in {elapsed}", file=sys.stdout)
