"""Training of scorers and policies."""
