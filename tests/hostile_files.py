"""Files that are made to harm whoever reads them.

Every entry of `HOSTILE` writes one file. A pickle that calls something would create the file `CANARY` in the current
folder.
"""

from __future__ import annotations

import hostile_archives
import hostile_pickles
import hostile_results
from hostile import CANARY, HOSTILE

__all__ = ["CANARY", "HOSTILE", "hostile_archives", "hostile_pickles", "hostile_results"]
