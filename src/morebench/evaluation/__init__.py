"""Questions, predictions, scores of one cell."""
