"""timm's and torchvision's models, built, called and judged."""
