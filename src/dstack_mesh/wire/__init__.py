"""HTTP/1.1 as pure functions and small decoders over bytes (RFC 9110, RFC 9112)."""
