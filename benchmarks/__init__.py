"""What the gateway costs beside the same thing done bare, measured on the spot: `make bench`."""
