"""One file a family: how its checkpoint is laid out, how its network is called, how its prompts are encoded."""
