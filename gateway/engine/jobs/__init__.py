"""What the one owner of the jobs does: resume, kick, replay, and resolve dead letters."""
