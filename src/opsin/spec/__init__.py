"""Floor 0: what a model is, as frozen values. Imports no torch."""
