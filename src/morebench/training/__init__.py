"""One training step of one cell."""
