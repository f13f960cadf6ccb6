"""Handle records, published tables, claims and the pages rendered from them, without importing torch."""
