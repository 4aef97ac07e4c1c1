"""The service's connections: how they are accepted, what they may take, and how they end."""
