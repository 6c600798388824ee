"""A step of the optimizer: stacks of equal layers, and bundles of stacks."""
