"""Evaluation: held-out rows, metrics, comparison and report."""
