"""Floor 1: the modules, in torch. Knows nothing of text, media or families."""
