"""A client of the embedding service, synchronous and asynchronous (torch-free)."""

from mvmr.serve.client.calls import Embeddings, Hit, Label, Ranked
from mvmr.serve.client.client import AsyncClient, Client
from mvmr.serve.client.images import ImageError, ImageLike, Images

__all__ = ["AsyncClient", "Client", "Embeddings", "Hit", "ImageError", "ImageLike", "Images", "Label", "Ranked"]
