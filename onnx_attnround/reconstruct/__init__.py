"""Round a model so that its layers, then its blocks, give what those of the float model give."""
