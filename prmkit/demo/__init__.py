"""What the demo runs on, without a download: a synthetic sample of judged trajectories and a tiny base model."""
