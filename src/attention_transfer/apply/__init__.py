"""What one does with a network after training: evaluate, predict, maps, stages, export."""
