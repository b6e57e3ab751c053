"""Verification of senders: signature schemes, providers as data, handshakes.

schemes           a source's `verify:` → `verifier`; `presets/` and `preset_keys` are the providers
signing_methods   what a source and a provider have in common; `check_builder` makes a check of it
signatures        where a signature is, and what it covers (`signed_string`)
algorithms        those over shared secrets: HMACs, hashes
public_keys       those over public keys: Ed25519, ECDSA, RSA
json_web_tokens, message_signatures, credentials, client_certificates     the other checks
handshakes        URL verification
key_ring          which secret verifies until when
"""
