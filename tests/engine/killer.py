"""A plugin that ends its own process at a chosen call, as `kill -9` would.

`KILL_AT` counts the calls that write to the output; at that one the process is gone, before or after it, or with
half of its bytes written, by turns. A negative number is a block, counted from 1. `KILL_RANK` restricts it to one
process of several.
"""

import os
import signal

from pruneforge import hookimpl

_calls = 0
_counting = False


def chosen():
    """The call, if it is this process's."""
    rank = os.environ.get("RANK", "0")
    return int(os.environ.get("KILL_AT", "0")) if os.environ.get("KILL_RANK", rank) == rank else 0


@hookimpl
def pruneforge_block_pruned(result):
    """End the process in a block."""
    if chosen() == -1 - result.index:
        os.kill(os.getpid(), signal.SIGKILL)


@hookimpl
def pruneforge_run_started(run):
    """Begin to count."""
    global _counting
    at = chosen()
    if at <= 0 or _counting:
        return
    _counting = True

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
