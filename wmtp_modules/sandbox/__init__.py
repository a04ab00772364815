"""Runs untrusted programs: ``docs/sandbox.md`` says what each tier guarantees."""
