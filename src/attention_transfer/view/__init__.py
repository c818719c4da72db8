"""A page on loopback: drop an image, and see where each network looks and what it predicts."""
