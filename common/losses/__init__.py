"""Loss functions: pure functions of tensors, one family per file. Half precision is raised to float32."""
