"""Recipes that come with the package: YAML files that open with their command, their time and the score to expect."""
