"""Guidance distillation: one network call in place of the two of classifier-free guidance."""
