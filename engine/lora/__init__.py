"""LoRA adapters (arXiv:2106.09685) served beside the base model, as PEFT saves them.

adapter_config.py and checkpoint.py read a folder and check it against the model without torch, before any worker
starts; adapters.py holds the matrices and gives the rows of a step theirs.
"""
