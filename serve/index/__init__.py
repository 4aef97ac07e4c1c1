"""An index of embedded images, searched by cosine similarity."""

from mvmr.serve.index.index import Index

__all__ = ["Index"]
