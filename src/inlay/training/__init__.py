"""Supervised fine-tuning: read the data, mask it, train an adapter on it with TRL, measure it, report it.

Nothing is imported here, so that the command line can read ``inlay.training.settings`` without torch.
"""
