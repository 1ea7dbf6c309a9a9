"""Self-supervised DINO and DINOv2 pre-training of vision backbones, and their evaluation."""
