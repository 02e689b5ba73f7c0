"""Loads methods and families by name: the address that packages which extend this one import."""

from stepdistill.config.registry import family_names, load_family, load_method, method_names

__all__ = ["family_names", "load_family", "load_method", "method_names"]
