"""Predicts what a run will take in memory, work and time, from its config alone, before anything is downloaded."""
