"""Methods that act on the inputs of the whole model."""
