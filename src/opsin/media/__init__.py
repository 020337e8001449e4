"""Floor 1: pictures. `image` opens them under limits, `prepare` draws what a plan says. Imports no torch."""
