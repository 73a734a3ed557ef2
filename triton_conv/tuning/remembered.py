"""What was read from a kernel's code, kept beside the code in Triton's cache: disassembling takes as long as compiling.

Triton files a kernel under its source, options and compiler; here the way of reading is added to that.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from triton.runtime.cache import get_cache_manager

from . import code
from .code import Code, read


def read_once(kernel: Any, arch: int) -> Code:
    """`code.read`, the second time from Triton's cache."""
    manager, name = get_cache_manager(kernel.hash), f"triton_conv_{_reader()}_sm{arch}.json"
    known = manager.get_file(name)
    if known is not None:
        try:
            return Code(**json.loads(Path(known).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # cut off, or no longer there: read again
            pass
    found = read(kernel, arch)
    manager.put(json.dumps(asdict(found)), name, binary=False)
    return found


@cache
def _reader() -> str:
    return hashlib.sha256(Path(code.__file__).read_bytes()).hexdigest()[:16]
