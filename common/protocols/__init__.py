"""What is done to any trained encoder: classification, SVMs, search, a bridge, detection. They know no paper."""
