"""Records of finished stages, published tables, claims, and the pages rendered from them; imports no torch."""
