"""From images to a student bundle: the trainer, recipes, views, and what a run remembers."""
