"""Why a parameter shows no rows, and what to do about it where something can be done."""

STACKED = "stacked inside the loss: keep the stack as one parameter"
COMPLEX = "of complex numbers"  # no layer, and no matrix without rows either
VECTORS = "a vector in each step of a scan: "  # no matrix either
OF_ONE_USE = (
    "the loss is taken to have the terms of one use: give loss_average=<number of terms> if the "
    "uses are of parts of the batch"
)
NUMBER = "a Python number, not an array: not trained"

# By the equation that reads it.
REASONS = {
    "mul": "multiplied entry by entry",
    "while": "inside a while loop: use lax.scan",
    "concatenate": "concatenated with what is no parameter: multiply by each of them",
    "stack": STACKED,
    "dynamic_slice": (
        "sliced at a place that is known only at run time: reshape its axis to (chunks, size) and "
        "scan over the chunks"
    ),
    "slice": "sliced across its layout",
    "ragged_dot_general": (
        "multiplied by `ragged_dot_general` in another way than `ragged_dot` does: reshape its "
        "rows to one axis, and take `lax.ragged_dot`"
    ),
    "dot_general": "multiplied with a parameter",
}


def reason(name: str) -> str:
    """Why, of a parameter that an equation of this name reads."""
    return REASONS.get(name, f"read by `{name}`")


def made_by(what: str) -> str:
    """Why, of a parameter whose gradient the backward pass of a custom_vjp makes so."""
    return (
        f"inside a custom_vjp, which makes its gradient by {what}: make it a product of rows, "
        "x.T @ g, or multiply by it outside of the function"
    )
