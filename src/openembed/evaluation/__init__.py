"""Evaluation: metrics, significance, and the MTEB protocols on plain files or through mteb's own task classes."""
