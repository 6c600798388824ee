"""Warnings of one optimizer, each given once."""

from collections.abc import Sequence

from singd_core._warnings import warn


def listed(names: Sequence[str]) -> str:
    """The first two of names, and how many more there are."""
    few = [repr(name) for name in names[:2]]
    if len(names) > 2:
        return f"{', '.join(few)} and {len(names) - 2} more"
    return " and ".join(few)


class Warnings:
    """What was warned of."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def once(self, text: str, about: str = "") -> None:
        """Warn, unless that was done with this text or `about` the same."""
        if (about or text) not in self._known:
            self._known.add(about or text)
            warn(text)

    def knows(self, about: str) -> bool:
        """Whether a warning was given about this."""
        return about in self._known

    def unseen(self, layers: Sequence[str], what: str) -> None:
        """Warn once of each layer without rows, in one warning of all that are new."""
        names = [name for name in layers if f"no rows of {name}" not in self._known]
        if names:
            self._known.update(f"no rows of {name}" for name in names)
            warn(
                f"no rows of {listed(names)} have been seen. Until rows are seen, {what}. "
                "It has one of these causes: the script computes gradients itself, or an "
                "autograd.Function, such as the adjoint of an ODE solver (then "
                "SINGD(model.named_parameters()) expects no rows, and does not warn); backward ran "
                "before this optimizer was built; its zero_grad came between backward and step; "
                "inputs were empty; weights were used without calls of their modules; a registered "
                "module takes or returns no tensor; the model was compiled before the optimizer "
                "was built (then call torch.compiler.reset()), or by torch before 2.13"
            )
