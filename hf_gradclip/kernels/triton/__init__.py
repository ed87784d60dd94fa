"""Triton, for memory of a GPU: one launch for all tensors."""
