"""How long the notebooks measure: as long as their cells say, or shorter where tests run them.

What a notebook asserts holds at both lengths. Set COURSE_LENGTH=short for the shorter one.
"""

import os

SHORT = os.environ.get("COURSE_LENGTH") == "short"
SHARE = 0.4  # of the full length, where it is short


def seconds(full: float, least: float = 0.4) -> float:
    """Seconds of a load or a pause: `full`, or a share of it, but `least` at the least."""
    return max(min(full, least), SHARE * full) if SHORT else full


def rounds(full: int) -> int:
    """How often something is repeated: `full` times, or a share of that, but twice at the least."""
    return max(min(full, 2), round(SHARE * full)) if SHORT else full
