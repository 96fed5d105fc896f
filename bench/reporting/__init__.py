"""What `pytest bench` found: its results file, and the tables, figures and page made from it.

Measuring is in the folder ``bench`` of the repository. What is here reads a results file alone,
on any machine: nothing of it imports PyTorch.
"""
