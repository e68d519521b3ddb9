"""nmconv: N:M proportional units (arXiv 1709.06247) for any CNN, one call, source untouched."""
