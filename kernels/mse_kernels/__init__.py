"""Fused adapter kernels without Triton: a CPU library and a CUDA path behind one call."""
