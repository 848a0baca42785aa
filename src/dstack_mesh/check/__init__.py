"""What works here and what does not: each check gives data, and `cli.check` shows it."""
