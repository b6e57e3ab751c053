"""Several processes of one `gateway run`, a core each: a parent that starts them, and what each child knows of it.

    gateway run --processes 2 ── binds the ports, starts ──▶ process 0 ── own socket of the port, and the other's
         │  admin address: all on one page                  process 1
         └─ asks each at a unix socket, in a folder that nobody else may enter

The parent has no events: whatever it does, or doesn't, deliveries go on. A child is the same command again, in an
interpreter of its own, with GATEWAY_CHILD in its environment (`child.py`). It ends when its parent does.
"""
