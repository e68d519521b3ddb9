"""Run unmodified training scripts on converted models: ``python -m nmconv.run --ratio 2:1 -- train.py``."""
