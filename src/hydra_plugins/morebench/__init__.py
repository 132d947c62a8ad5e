"""The door Hydra demands for a sweeper and a launcher; the work is in morebench.matrix."""
