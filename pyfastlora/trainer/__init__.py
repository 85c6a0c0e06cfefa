"""`fastlora train`: a YAML with Axolotl's keys in, a PEFT adapter and a record of the run out.

Read in this order: config (what may be asked), data (rows to tokens), model (weights and adapter), training
(transformers' Trainer), run_dir (what is kept), job (the order in which all of it happens).
"""
