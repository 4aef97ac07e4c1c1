"""The student as ONNX, in three precisions, and onnxruntime to run it."""
