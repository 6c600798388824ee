"""Which cases of a test run always, and which with `make test-slow` alone."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def cases(every: Iterable[Any], *, fast: Collection[Any]) -> list[Any]:
    """All cases, for `pytest.mark.parametrize`. Cases that are not among the fast ones are slow.

    Raises:
        ValueError: If there is no such case as a fast one: it would be left out unseen.
    """
    every = list(every)
    unknown = [case for case in fast if case not in every]
    if unknown:
        raise ValueError(f"there are no cases {unknown}, only {every}")
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=[] if case in fast else pytest.mark.slow,
        )
        for case in every
    ]
