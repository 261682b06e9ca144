"""The commands of the command line, one file each; ``vitdecomp_lens.cli`` registers them."""
