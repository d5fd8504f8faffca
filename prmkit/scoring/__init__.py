"""Scoring: rows in, one line of scores out for each."""
