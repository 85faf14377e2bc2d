"""A cache of the last few results, which threads may share."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

MOST = 4  # instructions, and as many negative prompts; 50 MB an instruction in float32


class Remembered(OrderedDict):
    """Key -> result, of the MOST keys that were asked for last."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()  # held while it is looked at or changed

    def of(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Returns the result of `compute` for this key, and drops the least recently used."""
        with self._lock:
            value = self.get(key)
        if value is None:
            value = compute()  # without the lock: two threads may, and get the same
        with self._lock:
            self[key] = value
            self.move_to_end(key)
            if len(self) > MOST:
                self.popitem(last=False)
        return value
