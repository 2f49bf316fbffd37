"""What libraries find out anew each time, found out once: by a process that starts the product a thousand times."""

from __future__ import annotations

import functools

import redis.utils
from loguru import _better_exceptions


def remember() -> None:
    """Have redis-py know its version (2 ms a connection), and loguru where libraries are (7 ms a sink)."""
    redis.utils.get_lib_version = functools.cache(redis.utils.get_lib_version)
    formatter = _better_exceptions.ExceptionFormatter
    formatter._get_lib_dirs = staticmethod(functools.cache(formatter._get_lib_dirs))
    redis.utils.get_lib_version()
    formatter._get_lib_dirs()
