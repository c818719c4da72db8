"""Recipes of the package: YAML files that open with their command, time and score."""
