"""Which parameters of a model form layers, and what a layer knows of its rows."""
