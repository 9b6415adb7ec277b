"""Tables in Markdown, printed a row at a time, as measurements come in."""


def print_row(row: dict, header: bool) -> None:
    """Print a row of a table in Markdown; header: with its heads before it."""
    if header:
        print("| " + " | ".join(row) + " |\n|" + "---|" * len(row))
    print("| " + " | ".join(map(str, row.values())) + " |", flush=True)
