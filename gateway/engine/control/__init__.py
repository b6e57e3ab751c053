"""What operators command, as records of `gateway.control`, and what is in force by them."""
