"""Networks: encoders, projectors, and the student at work."""
