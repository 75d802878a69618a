"""What fine-tuning reaches beside timm and torchvision: `python -m bench.accuracy`."""
