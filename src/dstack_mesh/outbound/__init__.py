"""The local application's side: target headers, the pool of verified connections, the proxy."""
