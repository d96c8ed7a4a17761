"""CUDA kernels compiled at run time by NVRTC, and their cache on disk."""
