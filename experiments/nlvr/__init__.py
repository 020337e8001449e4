"""Yes/no answers about NLVR's pictures of shapes, learnt here: docs/experiments/nlvr.md."""
