"""Preference tuning of few-step students: PSO and reward gradients."""
