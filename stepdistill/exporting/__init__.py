"""Exports a student (LoRA, guidance adapter, pipeline) with a model card and a proof."""
