"""What leaves the project: ONNX."""
