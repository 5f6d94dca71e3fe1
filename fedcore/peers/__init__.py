"""Algorithms without a server in the middle: each runs on every node, and the nodes talk to each other.

A strategy derives from `PeerStrategy` and is one coroutine; the `Peer` it is given trains, sends and receives, in
virtual time or over a network.
"""
