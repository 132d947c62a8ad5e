"""The embedded default: scenes of scanned digits and tiny parts of the real classes."""
