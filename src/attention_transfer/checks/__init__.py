"""Preflight: a dry step before training, and what it finds."""
