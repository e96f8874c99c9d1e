"""The embedded Fashion-MNIST sample."""
