"""Small worlds with exact ground truth."""
