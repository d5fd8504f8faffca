"""Versions of judges: registered, compared, retrained, watched in production."""
