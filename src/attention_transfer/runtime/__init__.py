"""The machine of a run: device, precision, compilation, threads and processes."""
