"""Loss functions: pure functions of tensors, one family per file. Half precision is converted to float32."""
