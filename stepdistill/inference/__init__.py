"""Loads and draws with stock diffusers pipelines: bases, LoRAs, exported pipelines."""
