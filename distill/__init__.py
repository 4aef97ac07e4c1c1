"""Distillation: a frozen teacher's embeddings as one more representation of the original view.

This folder is imported as `mvmr.distillation`; `mvmr.distill` is the public function.
"""
