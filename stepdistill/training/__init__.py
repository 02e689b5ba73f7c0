"""Runs things: a session is built from a config, the trainer turns it into checkpoints, collect makes data sets."""
