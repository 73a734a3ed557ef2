"""`triton_conv.files` without its package, which loads torch: the parent of an evidence run is to have none."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triton_conv.files import printable as printable
    from triton_conv.files import read_bytes as read_bytes
    from triton_conv.files import read_json as read_json
    from triton_conv.files import shown as shown
else:
    _spec = importlib.util.spec_from_file_location(
        "bench.triton_conv_files", Path(__file__).parents[1] / "triton_conv/files.py"
    )
    _files = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_files)
    printable, read_bytes, read_json, shown = _files.printable, _files.read_bytes, _files.read_json, _files.shown
