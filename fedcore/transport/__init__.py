"""The gRPC link between a server and its clients: streams of tensors, identity, recovery."""
