"""Preflight: a trial step before training, and its findings."""
