"""Datasets: rows from files or the hub, turned into tokens and labels.

sources.py reads rows, one file per prompt family says what a row means, registry.py lists the families,
tokenise.py turns text into columns of token ids, prepare.py puts a configuration's datasets together,
collator.py pads batches.
"""
