"""Other people's training scripts, unmodified: ``python -m nmconv.run --ratio 2:1 -- train.py --model resnet50``."""
