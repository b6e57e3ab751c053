"""A searchable index of what the log has: one SQLite file, which can be deleted and rebuilt at any moment."""
