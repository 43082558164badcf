"""How the weights of one layer are rounded: pure mathematics on tensors of torch."""
