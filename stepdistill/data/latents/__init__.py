"""Latents on disk: teacher samples, trajectories, and the caches of encoded prompts and images."""
