"""Floor 5: does a model compute here what it computes elsewhere? Rung by rung, from pixels to greedy ids."""
