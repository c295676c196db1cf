"""What the commands are made of: flags, and what they ask for."""
