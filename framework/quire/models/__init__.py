"""Model families, as short declarations over shared layers."""
