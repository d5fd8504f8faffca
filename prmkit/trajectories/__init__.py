"""Importing agent runs: every usual form in, one record out, with the labels that people gave."""
