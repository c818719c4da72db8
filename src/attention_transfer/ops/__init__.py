"""Operations with a hand-written derivative; their reference formulas are in `tests/oracles`."""
