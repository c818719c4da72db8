"""What `auto` means on this machine, and what a run writes down about it."""
