"""Which backward pass the wrapper of copies averages, where sampled labels have their own."""

from __future__ import annotations

from singd_torch._distributed import is_averaged

_SPENT = (
    "DistributedDataParallel averages the gradients of one backward pass for each forward pass, "
    "which was the one of sampled labels: the gradients of the loss would be others on each "
    "process. Give sampled labels a forward pass of their own, before the one of the loss: call "
    "wrapped(x) and backward inside `with wrapped.no_sync(), optimizer.sampled_labels():`"
)


class Averaged:
    """What is known of the last forward pass of a wrapper.

    Attributes:
        is_to_come: Whether its averaged backward pass is still to come. None if it has none.
    """

    is_to_come: bool | None = None

    def call(self) -> None:
        """See a call of a layer, which may be a part of a forward pass of a wrapper."""
        found = is_averaged()
        if found is not None:
            self.is_to_come = found or None

    def take(self, sampled: str | None) -> None:
        """See a backward pass, `inside` or `outside` of the block of sampled labels.

        Raises:
            RuntimeError: If the pass of sampled labels was averaged in its place.
        """
        if sampled == "inside" and self.is_to_come:
            self.is_to_come = False
        if sampled == "outside" and self.is_to_come is False:
            raise RuntimeError(_SPENT)
