"""Serves an artifact over HTTP: the Open Inference Protocol (V2) on one ONNX Runtime session."""
