"""Exported students: ONNX in three precisions, TensorRT engines, and the proof that each does what torch does."""
