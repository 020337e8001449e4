"""Floor 1: conversations as messages, spans and ids. Imports no torch."""
