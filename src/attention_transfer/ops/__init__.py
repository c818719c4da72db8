"""The method's maths written for one purpose each; `reference` is the oracle the tests compare with."""
