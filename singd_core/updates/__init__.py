"""The updates: KFAC with its inverses, the inverse-free one, and the step of the weights."""
