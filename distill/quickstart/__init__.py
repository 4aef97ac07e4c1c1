"""The whole path on sample images, in minutes."""
