"""One module per benchmark: its question, target and scorer, in both profiles. Pure: no torch, no files."""
