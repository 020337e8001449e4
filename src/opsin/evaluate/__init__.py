"""Floor 5: figures with intervals, from a model's outputs. Metrics are pure Python and numpy and load no torch.

vqa, answers, captions, boxes, pope, retrieval   one metric each, with its definition, source and traps
parsers, metrics, figures, bootstrap             one shape for all of them
examples, rows, tasks, controls                  what is asked
answering, run, matching, folder, compare        asking it, keeping outputs, comparing
"""
