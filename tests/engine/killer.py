"""A plugin that ends its own process at a chosen call, as `kill -9` would.

`KILL_AT` counts the calls that write to the output; at that one the process is gone, before or after it, or with
half of its bytes written, by turns. `KILL_RANK` restricts it to one process of several.
"""

import os
import signal

from pruneforge import hookimpl

_calls = 0


@hookimpl
def pruneforge_run_started(run):
    """Begin to count."""
    at = int(os.environ.get("KILL_AT", "0"))
    if not at or os.environ.get("KILL_RANK", os.environ.get("RANK", "0")) != os.environ.get("RANK", "0"):
        return

    def counted(call):
        def wrapped(*args, **kwargs):
            global _calls
            _calls += 1
            if _calls != at:
                return call(*args, **kwargs)
            result = None
            if at % 3 == 1:
                result = call(*args, **kwargs)
            elif at % 3 == 2 and call.__name__ == "pwrite":
                call(args[0], args[1][: len(args[1]) // 2], *args[2:])
            os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    for name in ("pwrite", "fsync", "ftruncate", "replace"):
        setattr(os, name, counted(getattr(os, name)))
