"""The paper's tables and further studies: plans of shared runs, and the resulting tables."""
