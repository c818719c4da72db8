"""Attention transfer inside the training loops of other libraries."""
