"""What can be chosen by name. The command line asks before anything is loaded."""

from __future__ import annotations

from typing import Literal

GraphKind = Literal["radius", "nearest", "grid"]
Method = Literal["mixture", "leiden", "mclust"]
Preset = Literal["default", "paper", "original-code"]
Tie = Literal["true", "alias"]
