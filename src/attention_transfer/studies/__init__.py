"""The paper's tables and its reviewers' questions: plans of shared runs, and their tables."""
