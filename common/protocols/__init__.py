"""What is done to any trained model to measure it: classification, search, detection, texts, images."""
