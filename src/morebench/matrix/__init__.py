"""Many cells: identity, plan, state on disk, launch."""
