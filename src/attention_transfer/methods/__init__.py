"""The transfer methods, a file each; `registry.py` lists them for --method."""
