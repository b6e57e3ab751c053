"""What senders see: requests come in, are verified, and are answered once they are durable."""
