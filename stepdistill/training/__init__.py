"""Trains: a session is built from a config, and the trainer turns it into checkpoints."""
