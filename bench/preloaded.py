"""What the processes of models have imported when they start: they are forked from one that has."""

from __future__ import annotations

import contextlib
import importlib

import bench.peers.registry
import bench.worker
import cellpatch_fast.model.annotator  # noqa: F401
from bench.peers.annotators import without_package

with contextlib.suppress(ImportError), without_package("kernels"):
    importlib.import_module("transformers.models.bert.modeling_bert")
with contextlib.suppress(ImportError):
    importlib.import_module("performer_pytorch")
