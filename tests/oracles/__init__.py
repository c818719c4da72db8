"""The losses and their derivatives once more, by other ways: what the tests compare with."""
