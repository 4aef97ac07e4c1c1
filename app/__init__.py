"""The comparison app: teacher and student side by side, in the browser."""
