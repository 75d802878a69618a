"""Single operations between PyTorch's convolutions: batch norm with SiLU, squeeze-and-excite, the residual add."""
