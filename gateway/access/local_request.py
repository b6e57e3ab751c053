"""Whether a request comes from this machine, and whether a page of another site has a browser send it. Pure.

Who may connect to a loopback address has an account on the machine. But a browser there sends what pages of any site
make it send, and a proxy there passes on what anybody sends it. So the request must be addressed to the loopback
address by itself, not by a name that somebody's DNS resolves to it, and must not have come through a proxy.
"""

from collections.abc import Mapping
from ipaddress import ip_address

from yarl import URL

FORWARDING_HEADERS = (
    *("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Server"),
    *("X-Forwarded-Port", "X-Forwarded-Email", "X-Forwarded-User", "X-Real-IP", "X-Client-IP", "Via"),
    *("True-Client-IP", "CF-Connecting-IP", "CF-Ray", "X-Original-URL", "X-Original-Forwarded-For"),
    *("X-Envoy-External-Address", "X-Request-Start", "X-Amzn-Trace-Id"),
)
"""What proxies add to the requests that they pass on: one that has any of them is nobody's on this machine."""
_SAFE_METHODS = ("GET", "HEAD")


def is_loopback(address: str | None) -> bool:
    """Return whether the other end of a connection is this machine; None is a peer without an address."""
    try:
        found = ip_address((address or "").partition("%")[0])
    except ValueError:
        return False
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def is_local(peer: str | None, host: str, headers: Mapping[str, str], version: tuple[int, int]) -> bool:
    """Return whether a request was sent by a program on this machine, to its loopback address.

    `headers` are looked up in any case. A request of HTTP/1.0 isn't: by its defaults nginx speaks it to what it is a
    proxy of, names that as the host, and adds no header by which one would know.
    """
    if not is_loopback(peer) or version < (1, 1) or any(name in headers for name in FORWARDING_HEADERS):
        return False
    name = host_name(host)
    try:
        return is_loopback_name(name) or ip_address(name).is_unspecified  # how a listener on 0.0.0.0 is asked here
    except ValueError:
        return False


def is_loopback_name(name: str) -> bool:
    """Return whether a name, without port and brackets, is a loopback address whatever any DNS says."""
    return name == "localhost" or is_loopback(name)


def host_name(host: str) -> str:
    """Return the name in a `Host` header, in lower case, without port and brackets; "" if it is none."""
    try:
        return URL(f"http://{host}").host or ""
    except ValueError:
        return ""


def is_foreign(method: str, host: str, headers: Mapping[str, str]) -> bool:
    """Return whether a page of another origin had a browser make the request.

    Who follows a link elsewhere to a page here, in a tab of its own, made that request by themselves: it is allowed,
    as it changes nothing, and the other page doesn't see what it gets. `Origin` and the host are compared where a
    browser sends no `Sec-Fetch-Site`, which no page can set: a proxy may give the host another name.
    """
    is_link = (
        method in _SAFE_METHODS
        and headers.get("Sec-Fetch-Mode") == "navigate"
        and headers.get("Sec-Fetch-Dest") == "document"
        and "Origin" not in headers
    )
    if (site := headers.get("Sec-Fetch-Site")) is not None:
        return site not in ("same-origin", "none") and not is_link
    origin = headers.get("Origin")
    return origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower())
