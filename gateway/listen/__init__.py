"""`gateway listen`: events as the API of a process tells them, and copies of them to a program under development."""
