"""What all tests share."""

from hypothesis import settings

# No time limit an example: the first call of a library, and a busy machine, are slow.
# The same examples in every run, so that a failure is that of the change at hand.
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")
