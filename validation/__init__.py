"""Is it the same function: the measures that parity is judged by."""
