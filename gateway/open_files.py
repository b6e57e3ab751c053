"""How many files and connections this process may have open at a time."""

import resource

OPEN_FILES = 65_536
"""More than all attempts, idle connections and senders need together."""


def raise_file_limit() -> None:
    """Raise the limit of open files as far as the system allows: each attempt and each sender needs one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
