"""Rows of layers, from the calls that use their weights."""
