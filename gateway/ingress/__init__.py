"""The senders' side: requests are received, verified, and acknowledged once they are durable."""
