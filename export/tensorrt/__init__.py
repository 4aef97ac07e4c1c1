"""TensorRT's engines, and TensorRT for RTX."""
