"""Runs programs that nobody has read: see ``docs/sandbox.md`` for what each tier guarantees."""
