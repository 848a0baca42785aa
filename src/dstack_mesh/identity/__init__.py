"""Who a peer is: dstack's certificate extensions, the chain rules, and our own credentials."""
