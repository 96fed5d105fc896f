"""What models import from other packages, ahead of the processes that are forked for them."""

from __future__ import annotations

import contextlib
import importlib

from bench.peers.annotators import without_package

with contextlib.suppress(ImportError), without_package("kernels"):
    importlib.import_module("transformers.models.bert.modeling_bert")
with contextlib.suppress(ImportError):
    importlib.import_module("performer_pytorch")
