"""Pretraining, fine-tuning and what is said of their outcome."""
