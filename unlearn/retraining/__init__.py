"""The exact answer: the adapter trained again on other rows."""
