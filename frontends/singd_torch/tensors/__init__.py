"""Tensors of torch: joined, in pieces, in memory that is used again."""
