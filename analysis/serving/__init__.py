"""The explorer served on this machine, where a person also asks questions of their own."""
