"""What the example scripts share: pictures, networks, checkpoints and the one training loop."""
