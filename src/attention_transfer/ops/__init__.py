"""Operations with a written derivative; their oracles are in `tests/oracles`."""
