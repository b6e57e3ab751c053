"""What the bytes of a body mean: content codings, JSON, forms and XML, read within bounds. Nothing changes a body.

content        a body as rules read it: decompressed (`codings`), and parsed by its type (`media_types`)
forms, xml     as JSON has them
redaction      what of an event people may not see, by `hidden_paths`
"""
