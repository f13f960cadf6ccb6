"""Loss functions: pure functions of tensors, one family for each file, with shapes, ranges and the source."""
