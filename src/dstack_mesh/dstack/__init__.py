"""Clients of the CVM's surroundings: the guest agent and the gateway's info call."""
