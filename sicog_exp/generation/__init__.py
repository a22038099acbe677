"""Engines: what samples candidates. `engine` is the protocol, every other module one implementation."""
