"""The physics: a module frozen at an input is affine."""
