"""What names of headers and query parameters are made of."""

import re

TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2: a header's name
PARAMETER = re.compile(r"[0-9A-Za-z._~-]+")  # what no sender percent-encodes: RFC 3986, section 2.3
