"""Where and how a run computes: device, precision, compilation, threads and processes."""
