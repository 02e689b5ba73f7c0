"""One file a family: how its checkpoint is laid out, how its network wants to be called, how its prompts are encoded."""
