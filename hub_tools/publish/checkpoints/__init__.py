"""Push checkpoints in the background while training goes on."""
