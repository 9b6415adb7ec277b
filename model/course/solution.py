"""The solutions of exercises that are files, so that a lesson can go on without the reader's."""

import ast
import textwrap
from pathlib import Path

SOLUTIONS = Path(__file__).parents[2] / "notebooks" / "solutions.py"


def file_of(name: str) -> str:
    """The file that solves an exercise: what stands in its function of notebooks/solutions.py.

    Raises LookupError where there is no such function.
    """
    source = SOLUTIONS.read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            lines = source.splitlines(keepends=True)[node.body[1].lineno - 1 : node.end_lineno]
            return textwrap.dedent("".join(lines))
    raise LookupError(f"there is no exercise {name!r}")


def go_on_with(solved: bool, file: Path, name: str) -> None:
    """Where the reader's file is not right yet, put an exercise's solution in its place.

    It says so. The reader's is kept beside it, as …_draft.py.
    """
    if solved:
        return
    draft = file.rename(file.with_stem(f"{file.stem}_draft"))
    file.write_text(file_of(name))
    print(f"The lesson goes on with the solution of {file.name}; yours is {draft.name} now.")
