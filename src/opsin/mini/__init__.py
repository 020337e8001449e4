"""opsin-mini: the small model that the package carries, made by the recipe in this package. docs/opsin_mini.md.

tower      learns what stands in each patch of drawn pictures                    tower.py
language   learns to answer from labels of patches, before it sees a pixel       language.py
connect    the connector learns to give such labels' rows from the tower's       connect.py
finetune   everything learns together, from pictures with questions              recipe.py
"""
