"""Engines run a network: eager PyTorch, torch.compile, ONNX Runtime, TensorRT, AOTInductor."""
