"""The everyday engine."""
