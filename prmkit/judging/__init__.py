"""Proof and use: how good the judge is, and scores that are cheap enough to be a reward."""
