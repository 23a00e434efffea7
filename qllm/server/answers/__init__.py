"""What clients are answered: text completions and chat completions, and what both have in common (answer.py)."""
