"""Uses of a trained network: evaluate, predict, maps, stages, export."""
