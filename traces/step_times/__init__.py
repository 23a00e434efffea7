"""Step times: timing traces, what a pass costs by them, expert popularity, published measurements."""
