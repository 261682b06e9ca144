"""What ``vitdecomp-lens interpret`` does: one file for each question."""
