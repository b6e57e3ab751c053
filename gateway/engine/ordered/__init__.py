"""Routes with an order key: one delivery of a key at a time.

appender             writes the topics of ordered routes; `duplicate_appends` recognises what it wrote twice
reader               which records of such a topic are new
route                delivers them, and decides what halts a key and what releases it
blocked_keys         which keys are blocked or halted, and since when; `key_state` what else is known of a key
quiet_periods        of a debounced route: what supersedes what
conditions           matches again what halted because its condition couldn't be evaluated
kick_tally           the outcome of a kick
batching             lets other tasks run while many keys are gone through
"""
