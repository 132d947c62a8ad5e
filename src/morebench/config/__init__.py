"""What to run: typed choices, composed by Hydra, checked before anything starts."""
