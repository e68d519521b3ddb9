"""Networks that nobody wrote for nmconv, each in ten lines, and a judge that knows nothing of how nmconv works."""
