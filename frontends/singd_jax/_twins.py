"""Calls of one jaxpr with other parameters, such as equal blocks: the first one alone is traced.

jax keeps what it makes of a function, its derivative and its transpose, as long as it is the same
function. So equal calls call the same, and what was found in the first one is noted of the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from singd_jax._axes import Key, View
from singd_jax._joins import Join
from singd_jax._product import Noted, Origin, Path, Product, views_of
from singd_jax._tap import Ports
from singd_jax._trace import Results, Tracer

Leaves: TypeAlias = Mapping[int, int]  # the new number of each leaf


@dataclasses.dataclass
class Twin:
    """A call that was traced.

    Attributes:
        function: Takes the operands and the ports, which are numbered as `leaves` are.
        leaves: The leaves among its operands, in the order of the operands.
        within: The equations it lies in.
        found: Where its results come from.
        noted: What a tracer notes of it.
        looks: What its visits depend on.
    """

    function: Callable[..., Any]
    leaves: tuple[int, ...]
    within: Path
    found: list[Origin]
    noted: Noted
    looks: list[Any]


def run(
    tracer: Tracer,
    body: Callable[..., Any],
    made: Callable[[Callable[..., Any]], Callable[..., Any]],
    same: Any,
    values: Sequence[Any],
    origins: Sequence[Origin],
    ports: Ports,
) -> Results:
    """The results of a call and their origins.

    Args:
        tracer: The tracer.
        body: Takes operands, origins and ports; returns what this returns.
        made: Makes the function that is called of one that takes operands and ports.
        same: What equal calls have in common, besides operands and ports; None of one that has no
            equal.
        values: The operands.
        origins: Where they come from.
        ports: The ports of the weights among them.
    """
    leaves = tuple(dict.fromkeys(view.leaf for view in views_of(*origins)))
    number = {leaf: i for i, leaf in enumerate(leaves)}
    numbered = {(number[leaf], region): port for (leaf, region), port in ports.items()}
    stacks = {key: tuple(tracer.stacks[leaves[key[0]], key[1]]) for key in numbered}
    key: Any = None
    known = not any(isinstance(o, Product) for o in origins)
    if same is not None and known and _are_plain(origins):
        own = tuple(_renamed(o, number, ()) for o in origins)
        where = tracer.within[:-1], tracer.spread.unchecked
        key = same, where, own, frozenset(stacks.items())
    twin = tracer.twins.get(key)
    if twin is not None:
        twin = _as(twin, leaves, tracer.within)
        if twin.looks == _looks(tracer, twin.noted):
            tracer.noted.update(twin.noted)
            return list(twin.function(values, numbered)), twin.found
    found: list[Origin] = []

    def function(values: Any, ports: Any) -> Any:
        own = {(leaves[i], region): port for (i, region), port in ports.items()}
        results, found[:] = body(values, origins, own)
        return results

    kept, tracer.noted = tracer.noted, Noted()
    function = made(function)
    results = list(function(values, numbered))
    noted, tracer.noted = tracer.noted, kept
    tracer.noted.update(noted)
    if key is not None and _are_plain(found):
        looks = _looks(tracer, noted)
        tracer.twins[key] = Twin(function, leaves, tracer.within, found, noted, looks)
    return results, found


def _are_plain(origins: Sequence[Origin]) -> bool:
    """Whether no value, which another call has not, belongs to them."""
    return all(view.factor is None and not view.picks for view in views_of(*origins))


def _looks(tracer: Tracer, noted: Noted) -> list[Any]:
    """What the visits of all products depend on."""
    return [tracer.look(k, call) for k, calls in noted.calls.items() for call in calls.values()]


def _as(twin: Twin, leaves: Sequence[int], within: Path) -> Twin:
    """What was found in a call, as in a call of other leaves."""
    to = dict(zip(twin.leaves, leaves, strict=True))
    n = len(twin.within)

    def renamed(old: Mapping[Key, Mapping[Path, Any]]) -> dict[Key, dict[Path, Any]]:
        return {
            _key(k, to): {(*within, *path[n:]): _with_view(of, to) for path, of in of_key.items()}
            for k, of_key in old.items()
        }

    noted = Noted(
        renamed(twin.noted.calls),
        renamed(twin.noted.biases),
        {to[leaf]: of_leaf for leaf, of_leaf in twin.noted.reads.items()},
        {_key(k, to) for k in twin.noted.steps},
        {to[leaf] for leaf in twin.noted.vectors},
    )
    found = [_renamed(o, to, within) for o in twin.found]
    return Twin(twin.function, tuple(leaves), within, found, noted, twin.looks)


def _renamed(origin: Origin, to: Leaves, within: Path) -> Origin:
    """The same of other leaves, a product in a call that lies in these equations."""
    if isinstance(origin, View):
        return dataclasses.replace(origin, leaf=to[origin.leaf])
    if isinstance(origin, Join):
        views = tuple(dataclasses.replace(v, leaf=to[v.leaf]) for v in origin.views)
        return Join(origin.axis, views)
    if isinstance(origin, Product):
        pieces = tuple(
            dataclasses.replace(
                piece,
                key=_key(piece.key, to),
                path=(*within, *piece.path[len(within) :]),
                call=_with_view(piece.call, to),
            )
            for piece in origin.pieces
        )
        return Product(pieces, origin.dims)
    return None


def _key(key: Key, to: Leaves) -> Key:
    leaf, region = key
    return to[leaf], region


def _with_view(found: Any, to: Leaves) -> Any:
    """A call or a bias, of another leaf."""
    view = dataclasses.replace(found.view, leaf=to[found.view.leaf])
    return dataclasses.replace(found, view=view)
