"""Who asks at the admin address, and what they may see and do."""
