"""Prompts, images and latents: everything that a run reads."""
