"""Images by a short description: a folder, a standard data set, or a sample."""

from mvmr.data.image_set import ImageSet, Skipped, Split
from mvmr.data.opening import open_images

__all__ = ["ImageSet", "Skipped", "Split", "open_images"]
