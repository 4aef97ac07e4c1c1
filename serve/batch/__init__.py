"""The batch job: images in, a table of embeddings out."""
