"""Images by a short description of one grammar: folders, globs, lists, standard data sets, samples."""

from mvmr.data.image_set import ImageSet, Skipped, Split
from mvmr.data.opening import open_images

__all__ = ["ImageSet", "Skipped", "Split", "open_images"]
