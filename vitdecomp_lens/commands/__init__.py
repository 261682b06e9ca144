"""The commands that work over data sets, one file each; ``vitdecomp_lens.cli`` has the others."""
