"""Plugins with one plausible fault each, for every extension point; `kit_mutants.py` shows that the kit kills them."""
