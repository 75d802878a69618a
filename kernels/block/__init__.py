"""What a fused MBConv block is made of: its operations as Triton kernels, launch by launch."""
