"""Who asks at the admin address, and what they may see and do.

access              whose request it is, and in which role (`principal`)
access_file         who may ask: tokens, people and groups; `sign_in_lines` how they sign in; `read_file` reads both
tokens, throttle    tokens, and how many wrong ones may be tried
local_request       whether a request is from this machine, or from another site's page
sign_in             how people sign in: `sessions` are cookies, `sealed`
oidc                what an identity provider is asked and believed; `identity_provider` asks it
"""
