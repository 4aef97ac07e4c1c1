"""Frozen teachers, each one more representation of the original view."""
