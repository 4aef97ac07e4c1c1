"""Whatever turns images into embeddings for the app: engines, the teacher, another service."""
