"""What frozen features are worth: protocols on labelled images, and their scores."""
