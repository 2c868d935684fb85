"""Checks of single values: names, addresses, programs. Each returns why not, or None; and what was meant.

No message repeats the value: it may be a secret pasted into the wrong line.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import zoneinfo
from collections.abc import Iterable
from datetime import UTC, datetime
from urllib.parse import parse_qsl, unquote_to_bytes, urlsplit

from cronsim import CronSim, CronSimError

from taskd.model.names import RESERVED, is_type

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_SCHEMA = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*\.?")
_PATTERN_HOST = re.compile(r"(\*\.)?(.+)")
_DOTTED = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
_LONGEST_NAME = 64
_SCHEMES = ("postgresql://", "postgres://")
CRON_ALIASES = frozenset({"@hourly", "@daily", "@midnight", "@weekly", "@monthly", "@yearly", "@annually"})
_MAPPED_ALL = ipaddress.IPv6Network("::ffff:0:0/96")


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the nearest of the `known` names, or nothing."""
    if len(name) > _LONGEST_NAME:
        return ""
    names = {one.lower(): one for one in known}
    asked = name.lower().replace("-", "_")
    near = difflib.get_close_matches(asked, names, n=3, cutoff=0.6)
    # Of the near ones, that which begins alike: people misspell ends more than beginnings.
    best = max(near, key=lambda one: len(os.path.commonprefix([asked, one])) / len(one), default=None)  # noqa: RUF071
    return "" if best is None else f"; did you mean {names[best]}?"


def schema_name(text: str) -> str | None:
    """A schema's name goes into SQL; only plain ones are taken, so that nothing ever needs quoting."""
    if not _SCHEMA.fullmatch(text) or text.startswith("pg_"):
        return "must be a plain schema name: 1 to 63 of a-z, 0-9 and _, not beginning with a digit or pg_"
    if text in {"public", "information_schema"}:
        return "must be a schema name of its own, which taskd makes and owns: not public"
    return None


def type_name(text: str) -> str | None:
    """The name of a job type that a client may submit."""
    if not is_type(text):
        return "must be the name of a job type: a small letter, then up to 63 of a-z, 0-9, _, . and -"
    if text.startswith(RESERVED):
        return f"is reserved: names that begin with {RESERVED} belong to taskd itself"
    return None


def plain_name(text: str) -> str | None:
    """A name of a node, pool or schedule."""
    if _NAME.fullmatch(text):
        return None
    return "must be a name: a letter or digit, then up to 63 letters, digits, _, . and -"


def pool_name(text: str) -> str | None:
    """The name of a pool under `pools:`."""
    if text == "default":
        return "is the pool of the workers section: set workers.processes and workers.concurrency instead"
    return plain_name(text)


def module_name(text: str) -> str | None:
    """The dotted name of a Python module."""
    if _DOTTED.fullmatch(text):
        return None
    return "must be the dotted name of a Python module, such as taskd_email; no path and no .py"


def host(text: str) -> str | None:
    """An address or host name to listen on."""
    if _address(text) is not None:
        return None
    if re.fullmatch(r"[0-9.]+", text):
        return "must be an IP address or a host name; this is no valid IPv4 address"
    if _HOST.fullmatch(text):
        return None
    return "must be an IP address or a host name, without a port and without http://"


def allowed_host(text: str) -> str | None:
    """A host that webhooks may reach: a name, or `*.` and a name."""
    match = _PATTERN_HOST.fullmatch(text)
    return host(match[2]) if match else "must be a host name such as hooks.example.org or *.example.org"


def is_loopback(text: str) -> bool:
    """Whether only this machine can reach a listener on `text`."""
    address = _address(text)
    return address.is_loopback if address is not None else text.lower() in {"localhost", "localhost."}


def proxy(text: str) -> str | None:
    """An address or network whose forwarded headers are believed."""
    everything = "trusts every address: any client could forge its own; list the proxies' addresses"
    if text in {"*", "0/0", "any", "all"}:
        return everything
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        return "must be an IP address or a network such as 10.0.0.0/8"
    if network.prefixlen == 0 or network == _MAPPED_ALL:
        return everything
    if "/" in text and ipaddress.ip_interface(text).ip != network.network_address:
        return f"has host bits set: write {network} for the network, or the address alone"
    return None


def covers_all(networks: tuple[str, ...]) -> bool:
    """Whether networks that each pass `proxy` together are every address."""
    parsed = [ipaddress.ip_network(text, strict=False) for text in networks]
    four = list(ipaddress.collapse_addresses([n for n in parsed if isinstance(n, ipaddress.IPv4Network)]))
    six = list(ipaddress.collapse_addresses([n for n in parsed if isinstance(n, ipaddress.IPv6Network)]))
    return any(network.prefixlen == 0 for network in four) or any(network.prefixlen == 0 for network in six)


def cron(text: str) -> str | None:
    """Five cron fields, or one of the `@daily` kind."""
    if text.startswith("@"):
        return (
            None
            if text in CRON_ALIASES
            else f"must be one of {', '.join(sorted(CRON_ALIASES))}, or five cron fields"
        )
    if len(text.split()) != 5:
        return "must be a cron expression of five fields: minute hour day month weekday"
    try:
        # An impossible date ("0 0 30 2 *") is only found by looking for it.
        next(CronSim(text, datetime(2024, 1, 1, tzinfo=UTC)))
    except (CronSimError, StopIteration) as error:
        reason = str(error) or "it never comes true"
        return f"must be a cron expression of five fields (minute hour day month weekday): {reason}"
    return None


def timezone(text: str) -> str | None:
    """A name of the time zone database."""
    try:
        zoneinfo.ZoneInfo(text)
    except (OSError, ValueError, zoneinfo.ZoneInfoNotFoundError):
        known = zoneinfo.available_timezones()
        if not known:  # a machine without the database can't tell
            return None
        near = suggestion(text, known)
        return f"is an unknown time zone: timezone must be a name such as Europe/Berlin or UTC{near}"
    return None


def absolute_path(text: str) -> str | None:
    """A path that means the same wherever the daemon stands."""
    return None if text.startswith("/") else "must be an absolute path: begin with /"


def database_url(text: str) -> str | None:
    """A URL as libpq takes it; several hosts and sockets are fine."""
    form = "postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
    if not text.startswith(_SCHEMES):
        return f"must begin with postgresql:// or postgres://, like {form}"
    if any(character.isspace() or not character.isprintable() for character in text):
        return "must not contain white space or control characters: write them as %20 and the like"
    if re.search(r"%(?![0-9A-Fa-f]{2})", text):
        return "has a % that two hexadecimal digits must follow: write a lone % as %25"
    if b"\0" in unquote_to_bytes(text):
        return "must not contain %00"
    authority = re.split(r"[/?#]", text.split("://", 1)[1], maxsplit=1)[0]
    login, at, hosts = authority.rpartition("@")
    if "@" in login:
        return "has more than one @ before the host: write an @ in the password as %40"
    if "#" in text:
        return "has a #: write it as %23"
    for place in hosts.split(",") if hosts else []:
        problem = _place_problem(place)
        if problem:
            return problem if at or not login else f"{problem} (write / in a password as %2F, ? as %3F)"
    for name, value in parse_qsl(urlsplit(text).query, keep_blank_values=True):
        if name == "port" and not all(_is_port(port) for port in value.split(",") if port):
            return "has a port that is no number of 1 to 65535"
    return None


_ENCRYPTED = frozenset({"require", "verify-ca", "verify-full"})
_LOCAL = frozenset({"", "localhost", "127.0.0.1", "[::1]"})


def travels_plain(url: str) -> bool:
    """Whether a URL that passes `database_url` may lead over a network without TLS."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    places = parts.netloc.rpartition("@")[2].split(",") + options.get("host", "").split(",")
    hosts = {re.sub(r":[0-9]*$", "", place) for place in places}
    far = {host for host in hosts if host not in _LOCAL and not host.startswith(("/", "@", "%2F", "%2f"))}
    return bool(far) and options.get("sslmode") not in _ENCRYPTED


def has_password(url: str) -> bool:
    """Whether a URL that passes `database_url` holds a password."""
    parts = urlsplit(url)
    login = parts.netloc.rpartition("@")[0]
    return ":" in login or any(name == "password" for name, _ in parse_qsl(parts.query))


def _place_problem(place: str) -> str | None:
    match = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(?::(.*))?", place)
    if match is None:
        return "has a host that is none: write an IPv6 address in brackets, as in [::1]:5432"
    name, port = match[1], match[2]
    if name.startswith("["):
        address = _address(name[1:-1].split("%")[0])
        if address is None or address.version != 6:
            return "has brackets without an IPv6 address in them"
    if port and not port.isascii():
        return "has a port that is no number of 1 to 65535"
    if port and not _is_port(port):
        return "has a port that is no number of 1 to 65535 (in a password write / as %2F and : as %3A)"
    return None


def _is_port(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,5}", text) is not None and 1 <= int(text) <= 65535


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
