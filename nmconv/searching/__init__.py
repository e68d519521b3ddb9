"""Choosing which units lose their activations, by measurement."""
