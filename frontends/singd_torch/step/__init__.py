"""A step of the optimizer: stacks of equal layers, and on accelerators bundles of stacks."""
