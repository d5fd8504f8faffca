"""What a judge answered: reading it, and writing it as the training label."""

from prmkit.verdict.read import Shape, Unreadable, Verdict, answer_prefix, asked_shape, read_verdict, render_verdict

__all__ = ["Shape", "Unreadable", "Verdict", "answer_prefix", "asked_shape", "read_verdict", "render_verdict"]
