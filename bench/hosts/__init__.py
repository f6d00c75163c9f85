"""Two hosts on one machine: network namespaces (namespaces.py) with a link between them, of a stated rate that the
kernel keeps (shaped.py), or of any kind, by a relay in user space (relay.py)."""
