"""The embedding service over HTTP."""
