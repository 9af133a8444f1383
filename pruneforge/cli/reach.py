"""What a command does where the Hub cannot be reached."""

from __future__ import annotations

import os
import socket
import sys
import threading
from typing import Any
from urllib.request import getproxies, proxy_bypass

PATIENCE = 5.0
"""Seconds after which a host counts as not reached, if nothing says so earlier."""

_asked: dict[tuple[str, int], bool] = {}
"""Whether each host answered, by port."""

_asking = threading.Lock()


def answer_fast() -> None:
    """Have the Hub's libraries use their caches as soon as the Hub's host turns out not to be reached.

    By themselves they try each file again and again, for most of a minute. The host is only looked for when something
    is about to be asked of it.
    """
    from huggingface_hub import constants, get_session

    def check(request: Any) -> None:
        url = request.url
        with _asking:
            if constants.HF_HUB_OFFLINE or _has_proxy(url.scheme, url.host) or _answers(url.host, _port(url)):
                return
            constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that are begun later
        print(
            f"pruneforge: warning: {url.host} cannot be reached, so only what was downloaded before is used",
            file=sys.__stderr__ or sys.stderr,  # also where a library's output is kept aside
        )

    hooks = get_session().event_hooks["request"]
    if not any(getattr(hook, "__qualname__", "") == check.__qualname__ for hook in hooks):
        hooks.insert(0, check)


def _port(url: Any) -> int:
    return int(url.port or (80 if url.scheme == "http" else 443))


def _has_proxy(scheme: str, host: str) -> bool:
    """Return whether requests to a host go by way of a proxy, which may reach what this machine does not."""
    proxies = getproxies()
    return bool(proxies.get(scheme) or proxies.get("all")) and not proxy_bypass(host)


def _answers(host: str, port: int) -> bool:
    """Return whether a host takes a connection."""
    if (host, port) not in _asked:
        done, reached = threading.Event(), threading.Event()

        def connect() -> None:
            try:
                socket.create_connection((host, port), timeout=PATIENCE).close()
                reached.set()
            except OSError:
                pass
            done.set()

        # In a thread, since looking up a name has no limit of its own.
        threading.Thread(target=connect, daemon=True).start()
        done.wait(PATIENCE)
        _asked[host, port] = reached.is_set()
    return _asked[host, port]
