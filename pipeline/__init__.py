"""Mashup Learning (arXiv 2603.10156) as a Ray pipeline: start a finetune from what was trained before.

The flow is one page: `pipeline/run.py`.
"""

__version__ = "0.1.0"
