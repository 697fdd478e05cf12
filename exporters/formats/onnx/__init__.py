"""The ONNX format: a graph per segment, K and V as inputs and outputs."""
