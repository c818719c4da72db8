"""From a recipe to a run folder: devices, the loop, evaluation, and what a run leaves behind."""
