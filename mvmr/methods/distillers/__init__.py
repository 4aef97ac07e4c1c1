"""Methods that learn from teachers alone: a loss each, between features and a teacher's embedding."""
