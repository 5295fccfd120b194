"""The trainer: the only part that runs an encoder with gradients."""
