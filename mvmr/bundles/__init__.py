"""The student bundle, the one artifact of training: its files, its manifest, its card."""
