"""What is kept: scores, budgets, fair quotas, selection."""
