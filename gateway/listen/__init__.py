"""`gateway listen`: events as the API of a process tells them, and copies of them to a program under development.

feed           the live tail, over connections that may be cut: `messages` parses it, `cursor` is where it goes on
listening      sends copies on, which `copies` makes
live_events    between what is heard and the live list; `presentation` is how it looks
"""
