"""The names that a warning lists."""

from collections.abc import Sequence


def listed(names: Sequence[str]) -> str:
    """The first two of names, and how many more there are."""
    few = [repr(name) for name in names[:2]]
    if len(names) > 2:
        return f"{', '.join(few)} and {len(names) - 2} more"
    return " and ".join(few)
