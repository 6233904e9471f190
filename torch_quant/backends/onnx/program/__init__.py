"""From a lowered graph to an ONNX program, one matter a file."""
