"""Who may call: pure decisions over verified identities."""
