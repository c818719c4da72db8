"""Training: assembling a run, the trainer, its checkpoint, optimiser and loggers."""
