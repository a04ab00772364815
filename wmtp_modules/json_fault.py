"""What is wrong with a file that should be JSON, for the sentence that its reader makes of it."""


def json_fault(error: Exception) -> str:
    """What ``json.loads`` ran into, without Python's names for it.

    Args:
        error: that it raised: ValueError, UnicodeDecodeError or RecursionError.
    """
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 ({error.reason} at byte {error.start})"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error)
