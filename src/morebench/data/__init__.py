"""From a JSON record to a packed batch."""
