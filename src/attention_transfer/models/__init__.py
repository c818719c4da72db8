"""Creates networks by name, and loads their weights."""
