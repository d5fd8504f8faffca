"""Importing agent runs: any common form in, one record out, with the labels that people gave."""
