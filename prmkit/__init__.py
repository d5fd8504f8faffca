"""prmkit: judged agent trajectories in, a process reward model out."""

__version__ = "0.1.0"
