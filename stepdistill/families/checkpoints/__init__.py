"""Checkpoints on disk: folders, single files, hub ids, packaged public configs."""
